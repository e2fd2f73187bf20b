"""Peak memory of an onnxruntime engine that is not built, in a process of its own. Knows no arithmetic of its own."""

from __future__ import annotations

from dgemma_build.backends import backend_for
from dgemma_build.plan.weights import built_bytes
from dgemma_build.text_config import TextConfig, layer_values
from dgemma_runtime.memory_formulas import HostMemory, LayerWork, host_memory, limits_of

PREFILL_CHUNK = 512  # tokens: the runtime's default, `RuntimeSettings.prefill_chunk`


def planned_host_memory(config: TextConfig, precision: str, batch: int, context: int) -> HostMemory:
    """Of an engine of `precision` serving `batch` sequences of `context` tokens at once.

    Raises ConfigurationError for a precision that the onnxruntime backend does not build.
    """
    weights = built_bytes(config, backend_for("onnxruntime", precision).lowering())
    limits = limits_of(config.spec, batch, context, PREFILL_CHUNK)
    work = LayerWork(config.num_attention_heads, layer_values(config))
    return host_memory(config.spec, work, weights, limits, context)
