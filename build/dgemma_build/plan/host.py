"""Peak memory of the onnxruntime engine in a process of its own. Knows how that engine lays out its memory.

Exact are the weights and the page pools, which a running engine reserves as a whole. Its buffers follow
`dgemma_runtime.engines.onnxruntime`: one encode call's, and one workspace for all canvases, of `cache_slots` positions.
What ONNX Runtime allocates during a call is an estimate, fitted to 23 measured processes (two models, fp32 and int4,
256 to 16,384 tokens, 1 to 4 sequences) and within a tenth of each: 1.8 copies of attention's scores and two of its
masks in a prefill, four of the logits in a denoising step. Its arena keeps the larger of the two.
"""

from __future__ import annotations

from dataclasses import dataclass

from dgemma_build.backends import backend_for
from dgemma_build.checkpoint import TextConfig
from dgemma_build.plan.kv import KvSizes
from dgemma_build.plan.weights import built_bytes

PROCESS_BYTES = 75_000_000  # Python, numpy, onnxruntime with its session, measured with onnxruntime 1.31 on Linux
PREFILL_CHUNK = 512  # tokens: the runtime's default, `RuntimeSettings.prefill_chunk`
PREFILL_ROWS = 2  # chunks in one encode call: the runtime's default budget of 1,024 tokens
_SCORE_COPIES, _MASK_COPIES, _LOGIT_COPIES = 1.8, 2, 4
_FLOAT = 4  # bytes; the engine computes in fp32 whatever its weights are
_SMALLEST_SLOTS, _DOUBLING_UP_TO = 128, 4096


@dataclass(frozen=True)
class HostMemory:
    """Bytes by use; pages and buffers are counted as if written to."""

    process: int
    weights: int
    packed_embedding: int  # two copies for the head's products, made when the session is opened
    kv_pools: int
    workspaces: int
    activations: int

    @property
    def peak(self) -> int:
        return self.process + self.weights + self.packed_embedding + self.kv_pools + self.workspaces + self.activations


def host_memory(config: TextConfig, precision: str, batch: int, context: int) -> HostMemory:
    """Of an engine of `precision` serving `batch` sequences of `context` tokens at once.

    Raises ConfigurationError for a precision that the onnxruntime backend does not build.
    """
    spec = config.spec
    lowering = backend_for("onnxruntime", precision).lowering()
    kv = KvSizes.of(spec, "fp32")
    slots, canvas = cache_slots(context), spec.canvas_length
    chunk, rows = min(PREFILL_CHUNK, context), min(batch, PREFILL_ROWS)
    prefill = _buffers(kv, rows, chunk, slots)
    commit = _buffers(kv, batch, canvas, slots)
    encode = max(_call(config, rows, chunk, slots), _call(config, batch, canvas, slots))
    head = _LOGIT_COPIES * batch * canvas * spec.vocab_size * _FLOAT + _layer(config, batch * canvas)
    return HostMemory(
        process=PROCESS_BYTES,
        weights=built_bytes(config, lowering),
        packed_embedding=2 * spec.vocab_size * spec.hidden_size * _FLOAT,
        kv_pools=batch * kv.reserved_bytes(context, PREFILL_CHUNK),
        workspaces=_buffers(kv, batch, canvas, slots) + max(prefill, commit),
        activations=max(encode, head),
    )


def cache_slots(tokens: int) -> int:
    """Positions of a workspace for that many tokens, as the engine rounds them."""
    if tokens > _DOUBLING_UP_TO:
        return -(-tokens // _DOUBLING_UP_TO) * _DOUBLING_UP_TO
    return max(_SMALLEST_SLOTS, 1 << (tokens - 1).bit_length())


def _buffers(kv: KvSizes, rows: int, length: int, slots: int) -> int:
    """Caches of one call, a contiguous one per row."""
    sliding = min(slots, kv.window - 1 + length)
    return rows * (kv.full_token_bytes * slots + kv.sliding_token_bytes * sliding)


def _call(config: TextConfig, rows: int, length: int, slots: int) -> int:
    """Scores of one full layer, the masks of both kinds, and one layer's activations."""
    scores = round(_SCORE_COPIES * rows * config.num_attention_heads * length * slots * _FLOAT)
    masks = _MASK_COPIES * rows * length * (slots + min(slots, config.spec.sliding_window - 1 + length)) * _FLOAT
    return scores + masks + _layer(config, rows * length)


def _layer(config: TextConfig, tokens: int) -> int:
    """One layer's activations: residual stream and dense MLP, and the experts' rows before and after."""
    hidden, inner = config.spec.hidden_size, config.moe_intermediate_size
    dense = 4 * hidden + 3 * config.intermediate_size
    return tokens * _FLOAT * (dense + config.top_k_experts * (2 * hidden + 3 * inner))
