"""Canvases that run in one call: their rows of caches, inputs, results and soft embeddings. Knows no page accounting.

The rows of a call are the first ones, so before a call the rows that were left are filled from the end. A row that
was left keeps what it holds until then: the next canvas of the same sequence finds its context there. A canvas that has
ended is committed in its row, as one more row of the others' call, and the row stays its slot's.

Soft embeddings and whatever else only canvases have are in an order of their own, without gaps: an input names the row
of each. So a context never moves because another canvas ends, and a captured call depends on numbers only.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from dgemma_runtime.contract import CommitRow, DenoiseRow, SequencePages
from dgemma_runtime.engines.bindings import DENOISE, ROW_INPUTS, Bindings
from dgemma_runtime.engines.call_memory import CallMemory, FreshMemory, allocate_blocks, cache_tensors, free_blocks
from dgemma_runtime.engines.device import Array, Context, Graph, HostBytes, OutOfMemory, Pitched, Program
from dgemma_runtime.engines.kv_memory import Added, KvMemory
from dgemma_runtime.engines.row_content import RowContent

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shared:
    """What all workspaces of an engine share."""

    memory: KvMemory
    program: Program
    bindings: Bindings
    fresh: FreshMemory
    graphs: bool  # capture steps


@dataclass(frozen=True)
class Occupant:
    """A canvas under way, as far as it cannot be had from its pages."""

    slot: int
    position: int  # tokens of its context
    pages: SequencePages
    soft: HostBytes  # bits


@dataclass
class _Row:
    content: RowContent
    slot: int | None = None  # of the sequence that is here
    last_slot: int | None = None  # of the one that was here last
    position: int = 0  # tokens of its context
    pages: SequencePages | None = None


class _Call:
    """A pass over the first `rows` rows, of which so many are canvases: run as it is the first time, captured the
    second, replayed from then on.

    TensorRT wants one run before a capture, and for each graph a context of its own.
    """

    def __init__(self, workspace: Workspace, rows: int, canvases: int) -> None:
        self._workspace, self._canvases = workspace, canvases
        shared = workspace.shared
        self._context: Context = shared.program.context(DENOISE)
        self._graph: Graph | None = None
        self._ran, self._capture = False, shared.graphs
        length = shared.bindings.spec.canvas_length
        self.fresh = shared.fresh.blocks(rows, length)
        tensors = cache_tensors(shared.bindings, workspace.blocks, self.fresh, rows)
        try:
            self._context.bind(workspace.small.tensors(rows, canvases, length) | tensors)
        except BaseException:
            self._context.close()
            raise

    def run(self, kept: Sequence[int]) -> None:
        """The soft embeddings of `kept` become those of the next step; the others stay as they were."""
        if len(kept) < self._canvases:
            self._enqueue()
            for place in kept:
                self._workspace.keep_soft(place, 1)
            self._workspace.small.results.download()
        elif (graph := self._captured()) is not None:
            graph.launch()
        else:
            self._step()
        self._ran = True

    def _captured(self) -> Graph | None:
        if self._graph is None and self._ran and self._capture and self._context.can_be_captured():
            try:
                self._graph = self._workspace.shared.memory.device.capture(self._step)
            except OutOfMemory as error:
                self._capture = False
                _log.warning("a step runs without being captured, more slowly: %s", str(error))
        return self._graph

    def _step(self) -> None:
        self._enqueue()
        if self._canvases:
            self._workspace.keep_soft(0, self._canvases)
            self._workspace.small.results.download()

    def _enqueue(self) -> None:
        self._workspace.small.inputs.upload()
        self._context.enqueue()

    def close(self) -> None:
        if self._graph is not None:
            self._graph.close()
        self._context.close()


class Workspace:
    """Memory for `capacity` canvases with contexts of up to `slots` tokens. Raises OutOfMemory, holding nothing."""

    def __init__(self, shared: Shared, capacity: int, slots: int) -> None:
        self.shared, self.capacity, self.slots = shared, capacity, slots
        memory, length = shared.memory, shared.bindings.spec.canvas_length
        with ExitStack() as held:
            self.blocks = allocate_blocks(memory, capacity, slots)
            held.callback(free_blocks, memory, self.blocks)
            self.small = CallMemory(memory.device, shared.bindings, capacity, capacity, length)
            held.callback(self.small.close)
            self._held = held.pop_all()
        self._rows = [_Row(RowContent(slots, memory.limits.page_size)) for _ in range(capacity)]
        self._canvases: list[int] = []  # slots, in the order of soft embeddings
        self._calls: dict[tuple[int, int], _Call] = {}  # by numbers of rows and canvases

    @property
    def occupied(self) -> int:
        return sum(row.slot is not None for row in self._rows)

    def occupants(self) -> list[Occupant]:
        """Every canvas under way; waits for the device."""
        found = []
        for slot in self._canvases:
            row = self._rows[self.index(slot)]
            assert row.pages is not None
            found.append(Occupant(slot, row.position, row.pages, self.read_soft(slot)))
        return found

    def remembers(self, slot: int) -> bool:
        """Whether the slot's last canvas stood in a row that nobody has taken since."""
        return any(row.slot is None and row.last_slot == slot for row in self._rows)

    def has_canvas(self, slot: int, position: int) -> bool:
        """Whether a canvas is under way in the slot, behind so many tokens."""
        return slot in self._canvases and self._rows[self.index(slot)].position == position

    # ------------------------------------------------------------ canvases

    def place(self, slot: int, position: int, pages: SequencePages) -> None:
        """Give a canvas a free row, lay its context out and zero its soft embedding."""
        free = [index for index, row in enumerate(self._rows) if row.slot is None]
        index = min(free, key=lambda number: (self._rows[number].last_slot != slot, number))
        row, memory = self._rows[index], self.shared.memory
        row.slot = row.last_slot = slot
        row.position, row.pages = position, pages
        inputs = self.small.inputs.arrays
        inputs["position"][index] = position
        inputs["sliding_length"][index] = memory.sliding_length(position)
        memory.lay_out(self.blocks, index, position, pages, row.content)
        self._canvases.append(slot)
        memory.device.zero(self._soft(len(self._canvases) - 1), self.small.soft_row_bytes)

    def leave(self, slot: int) -> None:
        """The sequence is over, or goes elsewhere."""
        if slot in self._canvases:
            self._end(slot)
        row = self._rows[self.index(slot)]
        row.slot = row.pages = None

    def prepare(self, stepping: int, commits: int) -> None:
        """Make what `run` with so many canvases and commits needs. Raises OutOfMemory."""
        self._call(len(self._canvases) - commits if stepping else 0)

    def run(self, rows: Sequence[DenoiseRow], commits: Sequence[CommitRow]) -> list[int]:
        """Queue one step of these canvases, and these ended ones beside them, which must be prepared.

        Returns the canvases' places in `results`, to be read after `synchronize`. The slots of commits keep their rows.
        """
        for commit in commits:
            self._end(commit.slot)
        self._compact()
        places = [self._canvases.index(row.slot) for row in rows]
        self._fill(rows, commits, places)
        call = self._call(len(self._canvases) if rows else 0)
        call.run(places)
        for commit in commits:
            self._append(call, commit)
        return places

    @property
    def results(self) -> dict[str, Array]:
        """Of the last step, by place."""
        return self.small.results.arrays

    def _call(self, canvases: int) -> _Call:
        key = (self.occupied, canvases)
        if key not in self._calls:
            self._calls[key] = _Call(self, *key)
        return self._calls[key]

    def _fill(self, rows: Sequence[DenoiseRow], commits: Sequence[CommitRow], places: Sequence[int]) -> None:
        """The call's inputs. Rows and canvases that take no part keep theirs, and nobody reads their results."""
        inputs = self.small.inputs.arrays
        for row, place in zip(rows, places, strict=True):
            inputs["token_ids"][self.index(row.slot)] = row.canvas_ids
            inputs["uniforms"][place], inputs["temperature"][place] = row.uniforms, row.temperature
        for commit in commits:
            inputs["token_ids"][self.index(commit.slot)] = commit.token_ids
        canvases = [self.index(slot) for slot in self._canvases] if rows else []
        inputs["canvas_rows"][: len(canvases)] = canvases
        inputs["is_canvas"][:] = False
        inputs["is_canvas"][canvases] = True

    def _append(self, call: _Call, commit: CommitRow) -> None:
        """The canvas becomes context: of its pages, and of its row where it has room for it."""
        index, memory = self.index(commit.slot), self.shared.memory
        row, count = self._rows[index], len(commit.token_ids)
        added = Added(index, commit.position, count, commit.pages)
        if commit.position + count > self.slots:
            memory.store(call.fresh, added)
            return
        memory.append(call.fresh, self.blocks, added, row.content)
        row.position, row.pages = commit.position + count, commit.pages

    def index(self, slot: int) -> int:
        """The row of a sequence that is here."""
        return next(index for index, row in enumerate(self._rows) if row.slot == slot)

    def _compact(self) -> None:
        """Move sequences from the end into free rows, until the occupied rows are the first ones."""
        count = self.occupied
        holes = [index for index in range(count) if self._rows[index].slot is None]
        movers = [index for index in range(count, self.capacity) if self._rows[index].slot is not None]
        for target, source in zip(holes, movers, strict=True):
            self._move(source, target)

    def _move(self, source: int, target: int) -> None:
        memory = self.shared.memory
        origin, goal = self._rows[source], self._rows[target]
        memory.move(self.blocks, source, target, origin.position)
        goal.content.take(origin.content, origin.position)
        goal.slot, goal.last_slot, goal.position, goal.pages = origin.slot, origin.slot, origin.position, origin.pages
        origin.slot = origin.pages = None
        for name in ROW_INPUTS:
            array = self.small.inputs.arrays[name]
            array[target] = array[source]

    # ------------------------------------------------------------ soft embeddings

    def _end(self, slot: int) -> None:
        """The canvas is over; the last soft embedding takes the place of its own."""
        place, last = self._canvases.index(slot), self._canvases.pop()
        if last != slot:
            self._canvases[place] = last
            self._copy(self._soft(place), self._soft(len(self._canvases)), self.small.soft_row_bytes)

    def keep_soft(self, first: int, count: int) -> None:
        """Make the last step's soft embeddings of some canvases those of the next."""
        offset, size = first * self.small.soft_row_bytes, count * self.small.soft_row_bytes
        self._copy(self.small.soft + offset, self.small.next_soft + offset, size)

    def read_soft(self, slot: int) -> HostBytes:
        """The bits of a canvas's soft embedding; waits for the device."""
        device = self.shared.memory.device
        staging = device.host_bytes(self.small.soft_row_bytes)
        device.download(staging, self._soft(self._canvases.index(slot)))
        device.synchronize()
        bits = staging.copy()
        device.free_host_bytes(staging)
        return bits

    def write_soft(self, slot: int, bits: HostBytes) -> None:
        """The reverse."""
        device = self.shared.memory.device
        staging = device.host_bytes(self.small.soft_row_bytes)
        staging[:] = bits
        device.upload(self._soft(self._canvases.index(slot)), staging)
        device.synchronize()
        device.free_host_bytes(staging)

    def _soft(self, place: int) -> int:
        return self.small.soft + place * self.small.soft_row_bytes

    def _copy(self, target: int, source: int, nbytes: int) -> None:
        self.shared.memory.device.copy(Pitched(target, nbytes, 1), Pitched(source, nbytes, 1), (nbytes, 1, 1))

    def close(self) -> None:
        for call in self._calls.values():
            call.close()
        self._calls.clear()
        self._held.close()
