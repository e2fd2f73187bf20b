"""Kernels in the Triton language for what TensorRT has no layer for. Knows tensors, no model file and no engine."""
