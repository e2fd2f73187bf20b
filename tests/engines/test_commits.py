"""Ended canvases as rows of the others' call: what is computed, kept and copied, in which order, in which graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from dgemma_runtime.contract import FULL, SLIDING, LayerSpec, Manifest
from dgemma_runtime.engines.bindings import DENOISE
from dgemma_runtime.engines.device import Array

if TYPE_CHECKING:
    from tests.engines.conftest import Harness, Sequence

Make = Callable[..., "Harness"]
SEVERAL = (LayerSpec(FULL, 1, 16), LayerSpec(SLIDING, 1, 24), LayerSpec(FULL, 2, 8))


def watch(harness: Harness) -> list[tuple[int, list[int]]]:
    """Profile and canvas rows, call by call."""
    calls, function = [], harness.program.function

    def watched(profile: int, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        calls.append((profile, inputs["canvas_rows"].tolist()))
        function(profile, inputs, outputs)

    harness.program.function = watched
    return calls


def others(sequences: dict[int, Sequence], *slots: int) -> dict[int, Sequence]:
    return {slot: one for slot, one in sequences.items() if slot not in slots}


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("kv_dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("layers", [None, SEVERAL, SEVERAL[:1], SEVERAL[1:2]])
@pytest.mark.parametrize("page_size", [1, 3, 64])
def test_each_canvas_in_turn_becomes_context_beside_the_others(
    make: Make,
    manifest: Manifest,
    graphs: bool,
    kv_dtype: str,
    layers: tuple[LayerSpec, ...] | None,
    page_size: int,
) -> None:
    model = replace(manifest.model, layers=layers or manifest.model.layers)
    changed = replace(manifest, model=model, kv_dtype=kv_dtype)
    harness = make(limits=(3, 24, page_size, 300, 200), manifest=changed, graphs=graphs)
    sequences = {slot: harness.prefilled(7 + 9 * slot) for slot in range(3)}
    for turn in range(9):
        harness.denoise(sequences)
        harness.denoise(others(sequences, turn % 3), {turn % 3: sequences[turn % 3]})
        harness.check_pages(sequences[turn % 3])
    harness.denoise(sequences)


def test_a_commit_is_a_row_of_the_same_call(make: Make) -> None:
    """Whichever row it is, nobody moves for it. The longest context came first and has row 0."""
    harness = make()
    sequences = {slot: harness.prefilled(10 + slot) for slot in range(3)}
    harness.denoise(sequences)
    calls = watch(harness)
    harness.denoise(others(sequences, 1), {1: sequences[1]})
    harness.denoise(sequences)
    harness.denoise({2: sequences[2]}, others(sequences, 2))
    harness.denoise({}, {2: sequences[2]})
    assert [profile for profile, _ in calls] == [DENOISE] * 4
    assert [sorted(rows) for _, rows in calls] == [[0, 2], [0, 1, 2], [0], []]


def test_what_a_commit_copies(make: Make) -> None:
    """5 tokens behind 40 stand on 2 pages of 4; of the full layers also behind the context in their row."""
    harness = make()
    sequences = {slot: harness.prefilled(40) for slot in range(2)}
    for _ in range(2):  # the second time is captured and its copies are not counted
        harness.denoise(sequences)
        harness.denoise({0: sequences[0]}, {1: sequences[1]})
    before = harness.device.copies
    harness.denoise(sequences)
    # Of the second canvas the window's 10 tokens, up to 50, lie on 3 sliding pages; nothing else is laid out.
    assert harness.device.copies - before == 3
    before = harness.device.copies
    harness.denoise({0: sequences[0]}, {1: sequences[1]})
    # 50 to 55: 2 pages of both groups, and the row; the graph keeps soft embeddings.
    assert harness.device.copies - before == 2 * 2 + 1


def test_a_row_that_moves_takes_its_commit_along(make: Make) -> None:
    harness = make()
    sequences = {slot: harness.prefilled(40 + slot) for slot in range(3)}
    harness.denoise(sequences)
    harness.denoise(others(sequences, 0), {0: sequences[0]})  # of the shortest context, so in the last row
    harness.end(sequences.pop(2))
    harness.denoise({1: sequences[1]})  # the last row fills the first
    before = harness.device.copies
    harness.denoise(sequences)
    # The window's 10 tokens up to 45 lie on 4 sliding pages; the soft embeddings are kept.
    assert harness.device.copies - before == 4 + 1


def test_the_next_canvas_of_a_full_row_is_elsewhere(make: Make) -> None:
    """128 slots hold 124 tokens of context and not the next 5."""
    harness = make()
    sequences = {0: harness.prefilled(124), 1: harness.prefilled(20)}
    for _ in range(4):
        for _ in range(2):
            harness.denoise(sequences)
        harness.denoise({1: sequences[1]}, {0: sequences[0]})
        harness.check_pages(sequences[0])
    harness.denoise(sequences)


def test_calls_are_captured_by_numbers_of_rows_and_canvases(make: Make) -> None:
    harness = make()
    sequences = {slot: harness.prefilled(10 + slot) for slot in range(3)}
    for turn in range(9):
        harness.denoise(sequences)
        harness.denoise(others(sequences, turn % 3), {turn % 3: sequences[turn % 3]})
    assert [graph.launches for graph in harness.device.graphs] == [8, 8]
    assert harness.program.contexts == 1 + 2


def test_commits_of_two_workspaces_in_one_call(make: Make) -> None:
    """New keys and values of both pass through the same memory: one's are stored before the other's are made."""
    harness = make()
    sequences = {slot: harness.prefilled(length) for slot, length in enumerate((20, 21, 700))}
    for _ in range(3):
        harness.denoise(sequences)
        harness.denoise({1: sequences[1]}, {0: sequences[0], 2: sequences[2]})
        harness.check_pages(sequences[0])
        harness.check_pages(sequences[2])


def test_canvases_that_wait_keep_their_soft_embeddings(make: Make) -> None:
    """Also when another's is put in the place of one that has ended."""
    harness = make()
    sequences = {slot: harness.prefilled(10 + slot) for slot in range(3)}
    harness.denoise(sequences)
    harness.denoise({1: sequences[1]}, {0: sequences[0]})
    harness.denoise({}, {1: sequences[1]})
    harness.denoise({2: sequences[2]})
    harness.denoise(sequences)


def test_a_committed_sequence_may_wait_or_end(make: Make) -> None:
    harness = make()
    sequences = {slot: harness.prefilled(10 + slot) for slot in range(3)}
    harness.denoise(sequences)
    harness.denoise(others(sequences, 0, 1), {0: sequences[0], 1: sequences[1]})
    harness.denoise({2: sequences[2]})
    harness.end(sequences.pop(0))
    harness.denoise({2: sequences[2]})
    harness.denoise(sequences)
    harness.denoise({**sequences, 0: harness.prefilled(30)})


def test_a_commit_of_which_the_engine_knows_nothing(make: Make) -> None:
    """Its slot was released meanwhile, or belonged to another sequence: it is laid out for this."""
    harness = make()
    sequences = {slot: harness.prefilled(40 + slot) for slot in range(2)}
    harness.denoise(sequences)
    harness.engine.release(0)
    harness.denoise({1: sequences[1]}, {0: sequences[0]})
    harness.check_pages(sequences[0])
    harness.denoise({}, {2: (other := harness.prefilled(33))})
    harness.check_pages(other)
    harness.denoise({**sequences, 2: other})
