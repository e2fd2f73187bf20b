"""Bytes of keys and values: per token, and what a step reads and writes. Knows no weights, no pages and no GPU."""

from __future__ import annotations

from dataclasses import dataclass

from dgemma_runtime.contract import ModelSpec
from dgemma_runtime.memory_formulas import token_bytes


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
        token = token_bytes(spec, kv_dtype)
        return KvSizes(token.full, token.sliding, spec.sliding_window, spec.canvas_length)

    def seen_bytes(self, context: int) -> int:
        """What one denoising step reads for a context of that many tokens."""
        return self.full_token_bytes * context + self.sliding_token_bytes * min(context, self.window - 1)

    def canvas_bytes(self) -> int:
        """A canvas's own keys and values, which a step writes behind the context."""
        return self.canvas_length * (self.full_token_bytes + self.sliding_token_bytes)
