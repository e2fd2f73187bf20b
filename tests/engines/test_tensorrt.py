"""The TensorRT engine over a made-up model in ordinary memory: every byte that a call sees, and all given back."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.engines.conftest import Harness

Make = Callable[..., "Harness"]


@pytest.mark.parametrize("context", [1, 3, 4, 5, 9, 10, 11, 12, 16, 23, 24, 25, 47, 128, 129, 300])
def test_a_context_of_any_length_is_seen_whole(make: Make, context: int) -> None:
    harness = make()
    sequence = harness.sequence(context + 10)
    for start in range(0, context, 24):
        harness.encode([sequence], [min(24, context - start)])
    for _ in range(4):
        harness.denoise({1: sequence})
