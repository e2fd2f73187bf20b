"""Bytes of keys and values: per token, per sequence, per step. Knows no weights and no GPU.

A sequence reserves pages as `dgemma_runtime.pages` does: full layers keep every position; sliding layers keep the
window before a chunk and the chunk, at any place within pages. The tests hold this to the runtime's own numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

from dgemma_build.plan.options import ELEMENT_BYTES
from dgemma_runtime.contract import FULL, ModelSpec, cache_dtypes

PAGE_TOKENS = 64  # the runtime's default, `RuntimeSettings.page_size`


@dataclass(frozen=True)
class KvSizes:
    """Keys and values of one sequence."""

    full_token_bytes: int  # of one token in all full layers
    sliding_token_bytes: int  # of one token in all sliding layers
    window: int  # tokens that a sliding layer's window covers, the token's own included
    canvas_length: int  # tokens

    @staticmethod
    def of(spec: ModelSpec, kv_dtype: str) -> KvSizes:
        """`kv_dtype` as in a manifest."""
        width = {True: 0, False: 0}
        for layer in spec.layers:
            element_bytes = sum(ELEMENT_BYTES[dtype] for dtype in cache_dtypes(kv_dtype, layer))
            width[layer.kind == FULL] += layer.num_key_value_heads * layer.head_dim * element_bytes
        return KvSizes(width[True], width[False], spec.sliding_window, spec.canvas_length)

    def seen_bytes(self, context: int) -> int:
        """What one denoising step reads for a context of that many tokens."""
        return self.full_token_bytes * context + self.sliding_token_bytes * min(context, self.window - 1)

    def reserved_bytes(self, context: int, chunk: int) -> int:
        """The pages that a sequence of up to `context` tokens reserves, encoded by up to `chunk` at once."""
        full = -(-context // PAGE_TOKENS)
        span = self.window - 1 + max(min(chunk, context), self.canvas_length)
        sliding = min(full, (span + PAGE_TOKENS - 2) // PAGE_TOKENS + 1)
        return PAGE_TOKENS * (full * self.full_token_bytes + sliding * self.sliding_token_bytes)

    def canvas_bytes(self) -> int:
        """A canvas's own keys and values, which a step writes behind the context."""
        return self.canvas_length * (self.full_token_bytes + self.sliding_token_bytes)
