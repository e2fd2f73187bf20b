"""The graph's arrays for the rows of a call, and canvases that share them. Knows no library.

Each row has a cache per layer that is the graph's input and output at once: a call writes its keys and values behind
the row's context, in place. The rows of a call are the first ones, so before a call the rows that were left are filled
from the end. A short row that was left keeps what it holds until then: whoever has the same pages finds its context
there. A long one gives its memory back.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from dgemma_runtime.contract import SLIDING, CommitRow, DenoiseRow, EncodeRow, ModelSpec, SequencePages
from dgemma_runtime.engines.ort_pages import PagePools, RowCaches
from dgemma_runtime.engines.row_content import RowContent

SMALLEST_SLOTS = 128  # of a row of caches
KEPT_SLOTS = 4096  # longer rows are given back when nobody is in them
_MOST_SCORES = 2**25  # of one head in one encode call: it bounds what a long prompt takes beside its context

Array = npt.NDArray[Any]
Arrays = dict[str, Array]


def slots_for(tokens: int) -> int:
    """Cache slots of a row for so many tokens: a power of two up to 4,096, then a multiple of 4,096."""
    if tokens > KEPT_SLOTS:
        return -(-tokens // KEPT_SLOTS) * KEPT_SLOTS
    return max(SMALLEST_SLOTS, 1 << (tokens - 1).bit_length())


def encode_tokens(tokens: int) -> int:
    """How many tokens are encoded in one call at most where the context ends after `tokens`."""
    return max(64, _MOST_SCORES // slots_for(tokens) // 64 * 64)


class Rows:
    """Arrays for `rows` rows of up to `length` tokens over `slots` cache slots; up to `canvases` of them are such."""

    def __init__(self, spec: ModelSpec, page_size: int, rows: int, length: int, slots: int, canvases: int) -> None:
        self.slots = slots
        self.bindings: dict[tuple[int, int, int], Any] = {}  # whoever runs the graph may keep things of its own here
        self.content = [RowContent(slots, page_size) for _ in range(rows)]
        self.per_row: Arrays = {
            "token_ids": np.zeros((rows, length), np.int32),
            "position": np.zeros(rows, np.int64),
            "sliding_length": np.zeros(rows, np.int64),
            "is_canvas": np.zeros(rows, np.bool_),
        }
        self.per_canvas: Arrays = {
            "canvas_rows": np.arange(canvases, dtype=np.int64),
            "soft_embedding": np.zeros((canvases, length, spec.hidden_size), np.float32),
            "temperature": np.ones(canvases, np.float32),
            "uniforms": np.zeros((canvases, length), np.float32),
        }
        self.results: Arrays = {
            "argmax_ids": np.zeros((canvases, length), np.int32),
            "sampled_ids": np.zeros((canvases, length), np.int32),
            "entropies": np.zeros((canvases, length), np.float32),
            "next_soft_embedding": self.per_canvas["soft_embedding"],  # written last, after its last read
        }
        sliding_slots = min(slots, spec.sliding_window - 1 + length)
        self._kinds = [layer.kind for layer in spec.layers]
        self.caches: list[tuple[Array, Array]] = []
        self._mapped: list[mmap.mmap] = []  # of the full layers, where rows are long
        for layer in spec.layers:
            size = sliding_slots if layer.kind == SLIDING else slots
            shape = (rows, layer.num_key_value_heads, size, layer.head_dim)
            make = self._map if layer.kind != SLIDING and slots > KEPT_SLOTS else np.zeros
            self.caches.append((make(shape, np.float32), make(shape, np.float32)))

    def _map(self, shape: tuple[int, ...], dtype: type[np.float32]) -> Array:
        """Zeros, of which single rows can be given back to the operating system."""
        try:
            memory = mmap.mmap(-1, math.prod(shape) * np.dtype(dtype).itemsize)
        except OSError as error:
            raise MemoryError(f"{shape} numbers: {error}") from error
        with suppress(OSError):  # not every kernel has large pages
            memory.madvise(mmap.MADV_HUGEPAGE)
        self._mapped.append(memory)
        return np.frombuffer(memory, dtype).reshape(shape)

    def give_back(self, index: int) -> None:
        """The memory of a long row; its context is gone."""
        for memory in self._mapped:
            size = len(memory) // len(self.content)  # whole pages: long rows have a multiple of 4,096 slots
            memory.madvise(mmap.MADV_DONTNEED, index * size, size)
        if self._mapped:
            self.content[index].pages[:] = -1

    def bound(self, rows: int, length: int, canvases: int) -> tuple[Arrays, Arrays]:
        """Inputs and outputs of a call over the first `rows` rows, of which `canvases` are such."""
        assert rows == 1 or length == self.per_row["token_ids"].shape[1]
        caches = {
            f"{name}_{index}": array[:rows]
            for index, pair in enumerate(self.caches)
            for name, array in zip(("key_cache", "value_cache"), pair, strict=True)
        }
        per_row = {name: array[:rows] for name, array in self.per_row.items()}
        per_row["token_ids"] = per_row["token_ids"][:, :length]
        per_canvas, results = (
            {name: array[:canvases, :length] if array.ndim > 1 else array[:canvases] for name, array in arrays.items()}
            for arrays in (self.per_canvas, self.results)
        )
        return per_row | per_canvas | caches, results | {f"{name}_out": array for name, array in caches.items()}

    def row(self, index: int) -> RowCaches:
        """A row's caches."""
        return [(keys[index], values[index]) for keys, values in self.caches]

    def lay_out(self, pools: PagePools, index: int, position: int, pages: SequencePages) -> None:
        """Make a row hold a context."""
        pools.lay_out(self.row(index), self.content[index], position, pages)
        self.per_row["position"][index] = position
        self.per_row["sliding_length"][index] = pools.sliding_length(position)

    def store(self, pools: PagePools, index: int, length: int, pages: SequencePages) -> None:
        """Copy a row's last `length` tokens, just encoded, to their pages."""
        pools.store(self.row(index), self.content[index], int(self.per_row["position"][index]), length, pages)


Call = Callable[[Rows, int, int, int], None]  # runs the graph: rows, length, canvases


class EncodeRows(Rows):
    """One row that prompts are encoded in, chunk after chunk of any length up to `length`."""

    def __init__(self, spec: ModelSpec, page_size: int, length: int, slots: int) -> None:
        super().__init__(spec, page_size, 1, length, slots, canvases=0)

    def encode(self, call: Call, pools: PagePools, row: EncodeRow) -> None:
        """Lay the context out where it is not there yet, encode, copy to the pages."""
        length = len(row.token_ids)
        self.lay_out(pools, 0, row.position, row.pages)
        self.per_row["token_ids"][0, :length] = row.token_ids
        call(self, 1, length, 0)
        self.store(pools, 0, length, row.pages)


class Workspace(Rows):
    """Rows for `capacity` canvases."""

    def __init__(self, spec: ModelSpec, page_size: int, capacity: int, slots: int) -> None:
        super().__init__(spec, page_size, capacity, spec.canvas_length, slots, canvases=capacity)
        self._length = spec.canvas_length
        self._slots: list[int | None] = [None] * capacity  # the canvas in each row

    @property
    def occupied(self) -> int:
        return len(self._slots) - self._slots.count(None)

    @property
    def full(self) -> bool:
        return None not in self._slots

    def begin(self, pools: PagePools, slot: int, position: int, pages: SequencePages) -> None:
        """A canvas starts behind so much context: in its slot's row, or in the free one that holds most of it."""
        if slot in self._slots:
            index = self._slots.index(slot)
        else:
            free = [index for index, other in enumerate(self._slots) if other is None]
            index = max(free, key=lambda row: (pools.good_tokens(self.content[row], position, pages), -row))
        self.lay_out(pools, index, position, pages)
        self.soft(index)[:] = 0.0
        self._slots[index] = slot

    def leave(self, slot: int) -> None:
        """The slot's canvases are over."""
        index = self._slots.index(slot)
        self._slots[index] = None
        self.give_back(index)

    def index(self, slot: int) -> int:
        """The row of a slot's canvas."""
        return self._slots.index(slot)

    def soft(self, index: int) -> Array:
        """Of a row's canvas, for its next step; [canvas_length, hidden]."""
        soft: Array = self.per_canvas["soft_embedding"][index]
        return soft

    def can_commit(self, row: CommitRow) -> bool:
        """Whether the slot's row holds the context that the canvas stood behind."""
        return int(self.per_row["position"][self.index(row.slot)]) == row.position

    def run(self, call: Call, pools: PagePools, rows: Sequence[DenoiseRow], commits: Sequence[CommitRow]) -> list[int]:
        """One call; the places of `rows` in `results`.

        Canvases of this workspace that do not take part are computed and keep their soft embeddings.
        """
        self._compact()
        count = self.occupied
        committed = [self.index(row.slot) for row in commits]
        canvases = [index for index in range(count) if index not in committed]
        stepped = [self.index(row.slot) for row in rows]
        places = [canvases.index(index) for index in stepped]
        for index, commit in zip(committed, commits, strict=True):
            self.per_row["token_ids"][index] = commit.token_ids
        for index, place, row in zip(stepped, places, rows, strict=True):
            self.per_row["token_ids"][index] = row.canvas_ids
            self.per_canvas["uniforms"][place] = row.uniforms
            self.per_canvas["temperature"][place] = row.temperature
        self.per_row["is_canvas"][:count] = True
        self.per_row["is_canvas"][committed] = False
        self.per_canvas["canvas_rows"][: len(canvases)] = canvases
        if len(stepped) == count:
            call(self, count, self._length, count)
        else:
            self._run_some(call, count, canvases, stepped, places)
        for index, commit in zip(committed, commits, strict=True):
            self.store(pools, index, self._length, commit.pages)
            self.per_row["position"][index] += self._length
        return places

    def _run_some(
        self, call: Call, count: int, canvases: Sequence[int], stepped: Sequence[int], places: Sequence[int]
    ) -> None:
        """Soft embeddings stand in the order of rows, the graph wants those of canvases alone and side by side."""
        soft = self.per_canvas["soft_embedding"]
        kept = soft[:count].copy()
        soft[: len(canvases)] = kept[canvases]
        try:
            call(self, count, self._length, len(canvases))
            kept[stepped] = soft[places]
        finally:
            soft[:count] = kept

    def _compact(self) -> None:
        """Move canvases from the end into free rows, until the occupied rows are the first ones."""
        count = self.occupied
        holes = [index for index in range(count) if self._slots[index] is None]
        movers = [index for index in range(count, len(self._slots)) if self._slots[index] is not None]
        for target, source in zip(holes, movers, strict=True):
            self._move(source, target)

    def _move(self, source: int, target: int) -> None:
        full, sliding = (int(self.per_row[name][source]) for name in ("position", "sliding_length"))
        for kind, pair in zip(self._kinds, self.caches, strict=True):
            tokens = sliding if kind == SLIDING else full
            for cache in pair:
                cache[target, :, :tokens] = cache[source, :, :tokens]
        for array in (*self.per_row.values(), self.per_canvas["soft_embedding"]):
            array[target] = array[source]
        self.content[target].take(self.content[source], full)
        self._slots[target], self._slots[source] = self._slots[source], None
        self.give_back(source)
