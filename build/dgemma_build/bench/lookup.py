"""What a prompt-lookup draft costs the engine thread: milliseconds by length and kind of text, as one JSON line.

    python -m dgemma_build.bench.lookup

Knows the search, no engine and no model. One half of a text is the prompt, the other the output. The time is the least
of several, so that a busy machine shows less.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import numpy as np

from dgemma_runtime.contract import Int32Array
from dgemma_runtime.drafting.lookup import propose

LENGTHS = (1024, 16_384, 262_144)  # tokens, prompt and output
_CANVAS, _ROUNDS = 256, 9
_VOCABULARY = 262_144


def _words(length: int) -> Int32Array:
    """As in texts: the n-th most frequent token has a share of about 1 / n."""
    ranks = np.exp(np.random.default_rng(0).uniform(0, np.log(_VOCABULARY), length))
    token_ids: Int32Array = ranks.astype(np.int32)
    return token_ids


TEXTS: dict[str, Callable[[int], Int32Array]] = {
    "nothing repeated": lambda length: np.arange(length, dtype=np.int32),
    "words": _words,
    "words, copied": lambda length: np.tile(_words(length // 2), 2)[: length - 300],
    "two tokens in turn": lambda length: np.resize(np.array([5, 6], np.int32), length),
    "one token": lambda length: np.full(length, 5, np.int32),
}


def milliseconds(text: Int32Array) -> float:
    """Of one draft."""
    times = []
    for _ in range(_ROUNDS):
        started = time.perf_counter_ns()
        propose(text, len(text) // 2, _CANVAS)
        times.append(time.perf_counter_ns() - started)
    return min(times) / 1e6


def main() -> None:
    """Print the figures."""
    figures = {
        name: {str(length): float(f"{milliseconds(make(length)):.3g}") for length in LENGTHS}
        for name, make in TEXTS.items()
    }
    print(json.dumps({"unit": "ms per draft", **figures}))


if __name__ == "__main__":
    main()
