"""The TensorRT engine over a made-up model in ordinary memory: every byte that a call sees, and all given back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from dgemma_runtime.contract import FULL, SLIDING, EngineLimits, LayerSpec, Manifest
from dgemma_runtime.engines.device import Array
from dgemma_runtime.engines.host_device import HostDevice
from dgemma_runtime.engines.kv_memory import KEYS, VALUES, KvMemory, layer_groups
from dgemma_runtime.engines.number_formats import from_float32, to_float32
from dgemma_runtime.memory_formulas import page_pool_bytes

if TYPE_CHECKING:
    from tests.engines.conftest import Harness, Sequence

Make = Callable[..., "Harness"]


# Pages of 4, a window of 11 (10 tokens of context), chunks of 24, a smallest workspace of 128 slots.
@pytest.mark.parametrize("context", [1, 3, 4, 5, 9, 10, 11, 12, 16, 23, 24, 25, 47, 128, 129, 300])
def test_a_context_of_any_length_is_seen_whole(make: Make, context: int) -> None:
    harness = make()
    sequence = harness.prefilled(context)
    for _ in range(4):
        harness.denoise({1: sequence})


@pytest.mark.parametrize("page_size", [1, 3, 64])
@pytest.mark.parametrize("chunk", [5, 11, 40])
def test_any_page_and_chunk_size(make: Make, page_size: int, chunk: int) -> None:
    harness = make(limits=(2, chunk, page_size, 300, 200))
    sequences = [harness.prefilled(context) for context in (37, 64)]
    for _ in range(3):
        harness.denoise(dict(enumerate(sequences)))


FULLS = (LayerSpec(FULL, 1, 16), LayerSpec(FULL, 2, 8), LayerSpec(FULL, 1, 16))
SEVERAL = (LayerSpec(SLIDING, 1, 24), *FULLS, LayerSpec(SLIDING, 1, 24))


@pytest.mark.parametrize("kv_dtype", ["bf16", "fp16", "fp8"])
@pytest.mark.parametrize("slot_group", [1, 64])
@pytest.mark.parametrize("layers", [FULLS[:1], FULLS, (LayerSpec(SLIDING, 3, 4),), SEVERAL])
def test_any_layers_and_types(
    make: Make, manifest: Manifest, layers: tuple[LayerSpec, ...], kv_dtype: str, slot_group: int
) -> None:
    changed = replace(manifest, model=replace(manifest.model, layers=layers), kv_dtype=kv_dtype)
    harness = make(manifest=changed, slot_group=slot_group)
    sequences = [harness.prefilled(context) for context in (7, 29)]
    for _ in range(3):
        harness.denoise(dict(enumerate(sequences)))


@pytest.mark.parametrize("kv_dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("layers", [None, SEVERAL])
def test_keys_and_values_come_back_from_the_pages(
    make: Make, manifest: Manifest, kv_dtype: str, layers: tuple[LayerSpec, ...] | None
) -> None:
    model = replace(manifest.model, layers=layers or manifest.model.layers)
    harness = make(manifest=replace(manifest, model=model, kv_dtype=kv_dtype))
    sequence = harness.prefilled(53)
    for layer, kept in enumerate(sequence.kept):
        spec = harness.spec.layers[layer]
        start = 53 - 10 if spec.kind == SLIDING else 3
        stored = harness.engine.keys_values(layer, sequence.table.view, start, 51)
        dtypes = ("bf16" if spec.kind == FULL else kv_dtype, kv_dtype)
        for found, bits, dtype in zip(stored, kept, dtypes, strict=True):
            expected = to_float32(np.ascontiguousarray(bits[:, start:51]).view(np.uint8), dtype)
            assert np.array_equal(found, expected.transpose(1, 0, 2))
            assert np.unique(found).size > 20


# ---------------------------------------------------------------- groups, pages and copies


def test_what_has_one_type_is_one_group(manifest: Manifest) -> None:
    """Of each layer the keys, then the values; with fp8 those of full layers apart."""
    model = replace(manifest.model, layers=SEVERAL)
    both = {layer: [(layer, KEYS), (layer, VALUES)] for layer in range(5)}
    sliding, full, other = [*both[0], *both[4]], [*both[1], *both[3]], both[2]
    bf16 = layer_groups(model, "bf16")
    assert [list(group.tensors) for group in bf16] == [sliding, full, other]
    assert {group.dtype for group in bf16} == {"bf16"}
    fp8 = layer_groups(model, "fp8")
    assert [(group.dtype, list(group.tensors)) for group in fp8] == [
        ("fp8", sliding),
        ("bf16", full[::2]),
        ("fp8", full[1::2]),
        ("bf16", other[::2]),
        ("fp8", other[1::2]),
    ]
    assert [group.token_bytes for group in fp8] == [24, 32, 16, 16, 8]


@pytest.mark.parametrize("page_size", [1, 3, 64])
@pytest.mark.parametrize("kv_dtype", ["fp32", "bf16", "fp16", "fp8"])
@pytest.mark.parametrize("layers", [None, SEVERAL, FULLS, (LayerSpec(SLIDING, 3, 4),)])
def test_pages_take_the_memory_that_plans_count(
    manifest: Manifest, layers: tuple[LayerSpec, ...] | None, kv_dtype: str, page_size: int
) -> None:
    model = replace(manifest.model, layers=layers or manifest.model.layers)
    device, limits = HostDevice(), EngineLimits(3, 24, page_size, 70, 11)
    memory = KvMemory(device, model, kv_dtype, limits)
    assert device.allocated_bytes == page_pool_bytes(model, kv_dtype, limits)
    memory.close()
    assert device.live == 0


@pytest.mark.parametrize(("kv_dtype", "full"), [("bf16", 1), ("fp16", 1), ("fp8", 2)])
def test_a_page_is_one_copy_and_two_where_types_differ(
    make: Make, manifest: Manifest, kv_dtype: str, full: int
) -> None:
    """`full` is of a page of the full layers; of the sliding layers it is one with every type."""
    harness = make(manifest=replace(manifest, kv_dtype=kv_dtype))
    sequence, other = harness.sequence(), harness.sequence()
    counts = []

    def count(work: Callable[[], None]) -> None:
        before = harness.device.copies
        work()
        counts.append(harness.device.copies - before)

    count(lambda: harness.encode([sequence], [24]))  # writes 6 pages
    count(lambda: harness.encode([sequence], [16]))  # reads 6 and of the window's 10 tokens 3, writes 4
    count(lambda: harness.denoise({0: sequence}))  # reads 10 and 3, keeps the soft embedding
    harness.encode([other], [24])
    count(lambda: harness.denoise({1: other}))  # reads 6 and 3, keeps
    count(lambda: harness.leave(sequence))  # the last soft embedding takes its place
    count(lambda: harness.denoise({1: other}))  # moves a row, keeps
    assert counts == [6 * full + 6, 10 * full + 7, 10 * full + 4, 6 * full + 4, 1, full + 2]


# ---------------------------------------------------------------- canvases


def test_idle_canvases_keep_their_soft_embeddings(make: Make) -> None:
    harness = make()
    sequences = {slot: harness.prefilled(10 + slot) for slot in range(3)}
    for slots in ((0, 1, 2), (1,), (2, 0), (0, 1, 2), (2,), (0, 1, 2)):
        harness.denoise({slot: sequences[slot] for slot in slots})


def test_rows_are_filled_when_a_canvas_leaves(make: Make) -> None:
    harness = make()
    sequences = {slot: harness.prefilled(20 + 9 * slot) for slot in range(3)}
    harness.denoise(sequences)
    harness.end(sequences.pop(0))
    harness.denoise(sequences)
    other = harness.prefilled(33)
    harness.denoise({**sequences, 0: other})
    harness.end(sequences.pop(1))
    harness.denoise({**sequences, 0: other})


def test_a_first_step_starts_from_zeros_without_a_release(make: Make) -> None:
    harness = make()
    sequence = harness.prefilled(12)
    harness.denoise({0: sequence})
    sequence.soft = None
    harness.denoise({0: sequence})


def test_a_page_that_changed_hands_is_laid_out_again(make: Make) -> None:
    harness = make(limits=(1, 24, 4, 16, 20))
    for context in (60, 64, 23, 64):
        sequence = harness.prefilled(context)
        harness.denoise({0: sequence})
        harness.end(sequence)


def shortened(sequence: Sequence, length: int) -> Sequence:
    """The same sequence as it was with fewer tokens."""
    kept = [(keys[:, :length], values[:, :length]) for keys, values in sequence.kept]
    return replace(sequence, kept=kept, length=length, slot=None, soft=None)


def test_a_page_of_which_only_the_beginning_was_laid_out_is_completed(make: Make) -> None:
    harness = make()
    whole, other = harness.prefilled(9), harness.prefilled(9)
    for length in (6, 7, 5, 7):
        harness.denoise({0: other, 1: (one := shortened(whole, length))})
        harness.leave(other)
        harness.denoise({1: one})  # moves to the first row
        harness.leave(one)
        harness.denoise({1: (longer := shortened(whole, length + 2))})
        harness.leave(longer)


def test_a_row_that_another_canvas_moved_to_is_laid_out_again(make: Make) -> None:
    harness = make()
    sequences = {slot: harness.prefilled(21 + slot) for slot in range(2)}
    for _ in range(3):
        harness.denoise(sequences)
        harness.leave(sequences[0])
        harness.denoise({1: sequences[1]})
        harness.leave(sequences[1])
        harness.denoise({0: sequences[0]})


def test_the_next_canvas_lays_out_only_what_is_new(make: Make) -> None:
    harness = make(limits=(2, 24, 4, 400, 60))
    sequence = harness.prefilled(480)
    harness.denoise({0: sequence})
    harness.denoise({0: sequence})
    harness.leave(sequence)
    harness.encode([sequence], [harness.spec.canvas_length])
    before = harness.device.copies
    harness.denoise({0: sequence})
    # Two full pages hold the canvas's 5 tokens, the window's 10 tokens lie on 3 or 4 sliding pages; one of 121 pages
    # less would not be noticed, all of them would.
    assert harness.device.copies - before <= 2 + 4


def test_a_long_prompt_is_laid_out_once(make: Make) -> None:
    harness = make(limits=(1, 24, 4, 400, 60))
    sequence = harness.sequence()
    counts = []
    for _ in range(40):
        before = harness.device.copies
        harness.encode([sequence], [24])
        counts.append(harness.device.copies - before)
    # 6 full pages of the chunk before, 4 sliding pages, and 6 pages of both groups written; all again where the
    # number of slots doubles.
    usual = 6 + 4 + 2 * 6
    assert sorted(counts)[len(counts) // 2] <= usual
    assert sum(count > usual for count in counts) <= 3


def watch(harness: Harness) -> list[tuple[int, int]]:
    """Rows and slots of the full layers, call by call."""
    calls, function = [], harness.program.function

    def watched(profile: int, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        shape = inputs["key_cache_2"].shape
        calls.append((shape[0], shape[2] * shape[3]))
        function(profile, inputs, outputs)

    harness.program.function = watched
    return calls


def test_a_short_prompt_after_a_long_one_is_not_encoded_among_many_masked_slots(make: Make) -> None:
    harness = make()
    calls = watch(harness)
    harness.prefilled(600)
    harness.prefilled(48)
    slots = [128] * 6 + [256] * 5 + [512] * 11 + [1024] * 3 + [128] * 2
    assert calls == [(1, size) for size in slots]


def test_a_step_has_the_rows_of_its_canvases_only(make: Make) -> None:
    harness = make()
    sequences = {slot: harness.prefilled(10 + slot) for slot in range(3)}
    calls = watch(harness)
    for slots in ((0,), (0, 1), (0, 1, 2)):
        harness.denoise({slot: sequences[slot] for slot in slots})
    harness.end(sequences.pop(1))
    harness.denoise(sequences)
    assert calls == [(1, 128), (2, 128), (3, 128), (2, 128)]


# ---------------------------------------------------------------- workspaces and graphs


def test_a_growing_context_moves_to_a_larger_workspace(make: Make) -> None:
    harness = make(limits=(2, 24, 4, 800, 60))
    short, long = harness.prefilled(20), harness.prefilled(115)
    for _ in range(40):
        harness.denoise({0: short, 1: long})
        harness.denoise({0: short, 1: long})
        for sequence in (short, long):
            harness.leave(sequence)
        harness.encode([long], [15])
    assert long.length > 600


@pytest.mark.parametrize(("contexts", "calls"), [((64, 100, 200), 1), ((20, 100, 200), 2), ((20, 100, 120), 1)])
def test_canvases_gather_where_not_too_much_is_masked(make: Make, contexts: tuple[int, ...], calls: int) -> None:
    harness = make()
    sequences = {slot: harness.prefilled(context) for slot, context in enumerate(contexts)}
    for _ in range(3):
        harness.denoise(sequences)
    assert harness.program.contexts == 1 + calls
    assert len(harness.device.graphs) == calls


@pytest.mark.parametrize("graphs", [True, False])
def test_steps_are_captured_the_second_time_and_replayed_from_then_on(make: Make, graphs: bool) -> None:
    harness = make(graphs=graphs)
    sequences = {slot: harness.prefilled(10 + slot) for slot in range(3)}
    for _ in range(5):
        harness.denoise(sequences)
    assert [graph.launches for graph in harness.device.graphs] == ([4] if graphs else [])
    harness.end(sequences.pop(0))
    for _ in range(3):
        harness.denoise(sequences)
    assert [graph.launches for graph in harness.device.graphs] == ([4, 2] if graphs else [])


def test_what_cannot_be_captured_runs_as_it_is(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dgemma_runtime.engines.host_device._HostContext.can_be_captured", lambda self: False)
    harness = make()
    sequence = harness.prefilled(10)
    for _ in range(4):
        harness.denoise({0: sequence})
    assert harness.device.graphs == []


def test_nothing_is_left_after_an_empty_life(make: Make) -> None:
    make().close()


# ---------------------------------------------------------------- inspection


def test_a_soft_embedding_can_be_read_and_replaced(make: Make) -> None:
    harness = make()
    sequences = {slot: harness.prefilled(10 + slot) for slot in range(2)}
    harness.denoise(sequences)
    one = sequences[1]
    assert one.soft is not None
    assert np.array_equal(harness.engine.soft_embedding(1), to_float32(one.soft.view(np.uint8), "bf16"))
    values = np.random.default_rng(0).standard_normal(one.soft.shape, np.float32)
    harness.engine.set_soft_embedding(1, values)
    one.soft = from_float32(values, "bf16").view(np.uint16)
    harness.denoise(sequences)
