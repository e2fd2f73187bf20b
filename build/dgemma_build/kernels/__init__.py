"""Kernels in the Triton language for what TensorRT has no layer for. Knows tensors, no model file and no engine.

Weights and activations are bfloat16 or float16. Everything also takes float32, for tests in Triton's interpreter; on a
GPU the products of float32 would run in TF32.
"""
