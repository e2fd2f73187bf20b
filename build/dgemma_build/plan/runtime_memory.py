"""Device memory of the runtime's TensorRT engine, as planned for an engine that is not built. Knows no arithmetic.

The engine is taken as built for the planned context, and its pages to hold that of every sequence.
"""

from __future__ import annotations

from dgemma_build.attention import SLOT_GROUP
from dgemma_build.plan.options import PlanOptions
from dgemma_build.tensorrt import longest_chunk
from dgemma_runtime.contract import ModelSpec
from dgemma_runtime.memory_formulas import DeviceMemory, device_memory, limits_of


def runtime_memory(spec: ModelSpec, options: PlanOptions, sequences: int, context: int) -> DeviceMemory:
    """Of `sequences` at once, of up to `context` tokens each."""
    limits = limits_of(spec, sequences, context, longest_chunk(spec.canvas_length))
    largest = -(-context // SLOT_GROUP) * SLOT_GROUP
    return device_memory(spec, options.kv, options.activations, limits, largest)
