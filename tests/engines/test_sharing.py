"""Sequences that share pages on the TensorRT engine: a page's copy is good for whoever holds the page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from dgemma_runtime.contract import Manifest
from dgemma_runtime.engines.device import Array

if TYPE_CHECKING:
    from tests.engines.conftest import Harness

Make = Callable[..., "Harness"]


def copies(harness: Harness, work: Callable[[], None]) -> int:
    before = harness.device.copies
    work()
    return harness.device.copies - before


# Pages of 4, a window of 11, so 3 or 4 sliding pages are laid out each time.
SLIDING_PAGES = 4


@pytest.mark.parametrize("kv_dtype", ["bf16", "fp8"])
def test_two_sequences_on_the_same_pages_go_their_own_ways(make: Make, manifest: Manifest, kv_dtype: str) -> None:
    harness = make(manifest=replace(manifest, kv_dtype=kv_dtype))
    one = harness.prefilled(40)
    two, three = harness.sharing(one, 40), harness.sharing(one, 40)
    harness.encode([two, three], [7, 9])
    sequences = dict(enumerate((one, two, three)))
    for turn in range(6):
        harness.denoise(sequences)
        ended = {turn % 3: sequences[turn % 3]}
        harness.denoise({slot: other for slot, other in sequences.items() if slot not in ended}, ended)
        for sequence in sequences.values():
            harness.check_pages(sequence)


def test_a_slot_taken_by_a_sequence_with_the_same_pages_lays_out_its_own_only(make: Make) -> None:
    harness = make()
    one = harness.prefilled(400)
    two = harness.sharing(one, 400)
    harness.encode([two], [5])
    harness.denoise({0: one})
    harness.leave(one)
    # Two own pages of 102; and what every first step does: the window's pages, and one to keep the soft embedding.
    assert copies(harness, lambda: harness.denoise({0: two})) <= 2 + SLIDING_PAGES + 1


def test_a_prompt_on_shared_pages_is_encoded_behind_what_is_there(make: Make) -> None:
    harness = make()
    one = harness.prefilled(400)
    two = harness.sharing(one, 400)
    # Read: what the last chunk of the other's prompt wrote. Written: one page of both groups.
    assert copies(harness, lambda: harness.encode([two], [4])) <= 6 + SLIDING_PAGES + 2
    harness.denoise({0: one, 1: two})


def test_pages_given_to_another_sequence_are_laid_out_again(make: Make) -> None:
    """The same numbers at the same places of the table, in the same row: only what stands in them is another's."""
    harness = make(limits=(2, 24, 4, 30, 30))
    keeper = harness.prefilled(16)
    tables = []
    for turn in range(4):
        sequence = harness.sharing(keeper, 16)
        harness.encode([sequence], [20])
        harness.encode([sequence], [20])
        tables.append(sequence.table.view.full.tolist())
        harness.denoise({0: sequence})
        harness.denoise({1: keeper} if turn % 2 else {}, {0: sequence})
        harness.denoise({0: sequence})
        harness.end(sequence)
    assert tables == [tables[0]] * 4


def test_a_released_slot_is_taken_by_a_sequence_on_pages_that_were_the_last_ones(make: Make) -> None:
    """Evicted, and written again only in part: what a page held beyond that is not context."""
    harness = make(limits=(2, 24, 4, 30, 30))
    for lengths in ((24, 16), (24, 1), (7,), (24, 16), (9,), (5,), (6,)):
        sequence = harness.sequence()
        for length in lengths:
            harness.encode([sequence], [length])
        harness.denoise({0: sequence})
        harness.denoise({}, {0: sequence})
        harness.denoise({0: sequence})
        harness.end(sequence)


def test_a_page_outlives_the_sequence_that_wrote_it(make: Make) -> None:
    harness = make(limits=(2, 24, 4, 60, 60))
    one = harness.prefilled(40)
    harness.denoise({0: one})
    two = harness.sharing(one, 40)
    harness.end(one)
    other = harness.prefilled(60)
    harness.denoise({0: other})
    harness.encode([two], [3])
    harness.denoise({0: other, 1: two})
    harness.check_pages(two)


def test_many_long_contexts_on_the_same_pages_share_calls(make: Make) -> None:
    """Six, where the pages would hold one if each had its own."""
    harness = make(limits=(6, 24, 4, 300, 200))
    first = harness.prefilled(1000)
    sequences = {0: first}
    for slot in range(1, 6):
        sequences[slot] = harness.sharing(first, 1000)
        harness.encode([sequences[slot]], [slot])
    rows = []
    function = harness.program.function

    def watched(profile: int, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        rows.append(len(inputs["position"]))
        function(profile, inputs, outputs)

    harness.program.function = watched
    for _ in range(3):
        for sequence in sequences.values():
            sequence.soft = None
        rows.clear()
        harness.denoise(sequences)
    assert sorted(rows) == [2, 4]
