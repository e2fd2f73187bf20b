"""Where memory ends: what the TensorRT engine refuses and packs, and that a call without memory changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from dgemma_runtime.contract import Manifest
from dgemma_runtime.errors import ConfigurationError, EngineMemoryError

if TYPE_CHECKING:
    from tests.engines.conftest import Harness, Sequence

Make = Callable[..., "Harness"]
LeastMemory = Callable[[Manifest, tuple[int, ...]], int]


@pytest.mark.parametrize("kv_dtype", ["bf16", "fp8"])
def test_an_engine_says_how_much_memory_it_lacks(
    make: Make, manifest: Manifest, least_memory: LeastMemory, kv_dtype: str
) -> None:
    limits, changed = (3, 24, 4, 260, 40), replace(manifest, kv_dtype=kv_dtype)
    size = least_memory(changed, limits)
    with pytest.raises(ConfigurationError, match="the contexts of 3 canvases need"):
        make(manifest=changed, limits=limits, memory_bytes=size - 1)
    make(manifest=changed, limits=limits, memory_bytes=size)


def test_canvases_are_packed_tightly_where_memory_ends(make: Make) -> None:
    """A workspace with free rows gives way to one canvas with a long context; soft embeddings are kept."""
    harness = make(limits=(8, 24, 4, 400, 120))
    short, long = {slot: harness.prefilled(30 + slot) for slot in range(2)}, harness.prefilled(600)
    harness.denoise(short)
    graphs = len(harness.device.graphs)
    harness.device.memory_bytes = harness.device.allocated_bytes + 50_000
    harness.denoise({**short, 5: long})
    assert harness.device.allocated_bytes < harness.device.memory_bytes
    for _ in range(3):
        harness.denoise({**short, 5: long})
    assert len(harness.device.graphs) == graphs + 2


def test_an_encode_call_finds_room_too(make: Make) -> None:
    harness = make(limits=(8, 24, 4, 400, 120))
    sequences = {slot: harness.prefilled(30 + slot) for slot in range(2)}
    other = harness.prefilled(120)
    harness.denoise(sequences)
    harness.device.memory_bytes = harness.device.allocated_bytes + 1000
    harness.encode([other], [24])
    harness.encode([other], [24])
    harness.denoise({**sequences, 2: other})


# ---------------------------------------------------------------- calls without memory


def test_a_canvas_without_memory_is_an_error_and_changes_nothing(make: Make) -> None:
    """Those under way go on where they were; the new one starts once a slot is released."""
    harness = make(limits=(6, 24, 4, 340, 120))
    short = {slot: harness.prefilled(30 + slot) for slot in range(3)}
    first, second = harness.prefilled(600), harness.prefilled(610)
    for _ in range(3):
        harness.denoise({**short, 4: first})
    harness.device.memory_bytes = harness.device.allocated_bytes
    for _ in range(2):
        words = "too little memory: the .*layers' caches, 1 rows of .* slots need"
        with pytest.raises(EngineMemoryError, match=words):
            harness.denoise({**short, 4: first, 5: second})
        harness.denoise({**short, 4: first})
        harness.check_pages(first)
    harness.end(first)
    for _ in range(3):
        harness.denoise({**short, 5: second})


def test_a_commit_without_memory_is_an_error_and_changes_nothing(make: Make) -> None:
    harness = make(limits=(6, 24, 4, 200, 120))
    sequences = {slot: harness.prefilled(30 + slot) for slot in range(3)}
    long = harness.prefilled(600)
    harness.denoise(sequences)
    harness.device.memory_bytes = harness.device.allocated_bytes
    with pytest.raises(EngineMemoryError):
        harness.denoise({0: sequences[0], 5: long}, {1: sequences[1]})
    harness.denoise({0: sequences[0], 2: sequences[2]}, {1: sequences[1]})
    harness.denoise(sequences)


def grow(harness: Harness, sequence: Sequence, tokens: int) -> None:
    while sequence.length < tokens:
        harness.encode([sequence], [24])


def test_a_prompt_without_memory_is_an_error_and_changes_nothing(make: Make) -> None:
    """The encoder has given its old memory back by then, and takes a short prompt all the same."""
    harness = make(limits=(8, 24, 4, 800, 120))
    sequences = {slot: harness.prefilled(30 + slot) for slot in range(2)}
    long = harness.prefilled(120)
    harness.denoise(sequences)
    harness.denoise(sequences)
    harness.encode([long], [24])
    free = harness.device.memory_bytes
    harness.device.memory_bytes = harness.device.allocated_bytes
    with pytest.raises(EngineMemoryError, match=r"the full_attention layers' caches, 1 rows of .* slots need"):
        grow(harness, long, 3000)
    short = harness.sequence()
    harness.encode([short], [10])
    harness.denoise(sequences)
    harness.device.memory_bytes = free
    harness.encode([long], [24])
    harness.denoise({**sequences, 3: short, 4: long})


def test_what_an_encoder_had_before_it_found_no_memory_is_read_again(make: Make) -> None:
    """Its row is given up for a longer one; where that fails, nothing of it is left."""
    harness = make()
    long, short = harness.prefilled(250), harness.prefilled(100)
    harness.encode([long], [10])
    harness.encode([short], [1])  # the row holds this one's context
    free = harness.device.memory_bytes
    harness.device.memory_bytes = 0
    with pytest.raises(EngineMemoryError):
        harness.encode([long], [10])
    harness.device.memory_bytes = free
    harness.encode([short], [1])
    harness.denoise({0: short})


def test_canvases_for_which_packing_finds_no_room_come_back(make: Make) -> None:
    """Somebody else took the memory meanwhile. Soft embeddings are kept for whoever is not released."""
    harness = make(limits=(4, 24, 4, 800, 120))
    sequences = {slot: harness.prefilled(130 + slot) for slot in range(3)}
    for _ in range(2):
        harness.denoise(sequences)
    free, device = harness.device.memory_bytes, harness.device
    device.memory_bytes = device.allocated_bytes - 60_000
    with pytest.raises(EngineMemoryError):
        harness.denoise({**sequences, 3: harness.prefilled(400)})
    for ended in (None, 1, 2):
        others = {slot: one for slot, one in sequences.items() if slot != ended}
        with pytest.raises(EngineMemoryError):
            harness.denoise(others, {} if ended is None else {ended: sequences[ended]})
    harness.end(sequences.pop(0))
    harness.denoise({1: sequences[1]})
    device.memory_bytes = free
    harness.denoise(sequences)
    harness.denoise({1: sequences[1]}, {2: sequences[2]})
    harness.denoise(sequences)


def test_a_canvas_without_room_can_be_committed_started_again_or_released(make: Make) -> None:
    harness = make(limits=(4, 24, 4, 800, 120))
    sequences = {slot: harness.prefilled(130 + slot) for slot in range(3)}
    harness.denoise(sequences)
    free, device = harness.device.memory_bytes, harness.device
    device.memory_bytes = device.allocated_bytes - 200_000
    with pytest.raises(EngineMemoryError):
        harness.denoise({**sequences, 3: harness.prefilled(400)})
    device.memory_bytes = free
    harness.end(sequences.pop(2))
    sequences[1].soft = None
    harness.denoise({1: sequences[1]}, {0: sequences[0]})
    harness.denoise(sequences)
