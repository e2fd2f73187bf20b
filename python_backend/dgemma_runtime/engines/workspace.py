"""Canvases that run in one call: their rows of caches, inputs, results and soft embeddings. Knows no page accounting.

The rows of a call are the first ones, so before a call the rows that were left are filled from the end. A row that
was left keeps what it holds until then: the next canvas of the same sequence finds its context there.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass

from dgemma_runtime.contract import DenoiseRow, SequencePages
from dgemma_runtime.engines.bindings import DENOISE, Bindings
from dgemma_runtime.engines.call_memory import CallMemory, FreshMemory, allocate_blocks, cache_tensors, free_blocks
from dgemma_runtime.engines.device import Array, Context, Graph, HostBytes, Pitched, Program
from dgemma_runtime.engines.kv_memory import KvMemory, RowContent


@dataclass(frozen=True)
class Shared:
    """What all workspaces of an engine share."""

    memory: KvMemory
    program: Program
    bindings: Bindings
    fresh: FreshMemory
    graphs: bool  # capture steps


@dataclass
class _Row:
    content: RowContent
    slot: int | None = None  # of the canvas that is here
    last_slot: int | None = None  # of the canvas that was here last
    position: int = 0  # tokens of its context
    pages: SequencePages | None = None


class _Call:
    """A step over the first `rows` rows: run as it is the first time, captured the second, replayed from then on.

    TensorRT wants one run before a capture, and for each graph a context of its own.
    """

    def __init__(self, workspace: Workspace, rows: int) -> None:
        self._workspace, self._rows = workspace, rows
        shared = workspace.shared
        self._context: Context = shared.program.context(DENOISE)
        self._graph: Graph | None = None
        self._ran = False
        length = shared.bindings.spec.canvas_length
        fresh = shared.fresh.blocks(rows, length)
        tensors = cache_tensors(shared.bindings, workspace.blocks, fresh, rows)
        try:
            self._context.bind(workspace.small.tensors(rows, rows, length) | tensors)
        except BaseException:
            self._context.close()
            raise

    def run(self) -> None:
        """For all rows."""
        if self._graph is None and self._ran and self._workspace.shared.graphs and self._context.can_be_captured():
            self._graph = self._workspace.shared.memory.device.capture(self._step)
        if self._graph is None:
            self._step()
        else:
            self._graph.launch()
        self._ran = True

    def run_some(self, rows: Iterable[int]) -> None:
        """For some rows; the others keep their soft embedding."""
        self._enqueue()
        for row in rows:
            self._workspace.keep_soft(row, 1)
        self._workspace.small.results.download()
        self._ran = True

    def _step(self) -> None:
        self._enqueue()
        self._workspace.keep_soft(0, self._rows)
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
        self._calls: dict[int, _Call] = {}  # by number of rows

    @property
    def occupied(self) -> int:
        return sum(row.slot is not None for row in self._rows)

    def occupants(self) -> list[tuple[int, int, SequencePages]]:
        """Slot, context length and pages of every canvas."""
        found = []
        for row in self._rows:
            if row.slot is not None:
                assert row.pages is not None
                found.append((row.slot, row.position, row.pages))
        return found

    def remembers(self, slot: int) -> bool:
        """Whether the slot's last canvas stood in a row that nobody has taken since."""
        return any(row.slot is None and row.last_slot == slot for row in self._rows)

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
        memory.device.zero(self._soft(index), self.small.soft_row_bytes)

    def leave(self, slot: int) -> None:
        """The canvas is over."""
        row = self._rows[self._index(slot)]
        row.slot = row.pages = None

    def run(self, rows: list[DenoiseRow]) -> list[int]:
        """Queue one step of these canvases; their places in `results`, to be read after `synchronize`."""
        self._compact()
        places = [self._index(row.slot) for row in rows]
        inputs = self.small.inputs.arrays
        for place, row in zip(places, rows, strict=True):
            inputs["token_ids"][place] = row.canvas_ids
            inputs["uniforms"][place] = row.uniforms
            inputs["temperature"][place] = row.temperature
        count = self.occupied
        if count not in self._calls:
            self._calls[count] = _Call(self, count)
        if len(places) == count:
            self._calls[count].run()
        else:
            self._calls[count].run_some(places)
        return places

    @property
    def results(self) -> dict[str, Array]:
        """Of the last step, by place."""
        return self.small.results.arrays

    def _index(self, slot: int) -> int:
        return next(index for index, row in enumerate(self._rows) if row.slot == slot)

    def _compact(self) -> None:
        """Move canvases from the end into free rows, until the occupied rows are the first ones."""
        count = self.occupied
        holes = [index for index in range(count) if self._rows[index].slot is None]
        movers = [index for index in range(count, self.capacity) if self._rows[index].slot is not None]
        for target, source in zip(holes, movers, strict=True):
            self._move(source, target)

    def _move(self, source: int, target: int) -> None:
        memory, size = self.shared.memory, self.shared.memory.limits.page_size
        origin, goal = self._rows[source], self._rows[target]
        memory.move(self.blocks, source, target, origin.position)
        goal.content.take(origin.content, origin.position, size)
        goal.slot, goal.last_slot, goal.position, goal.pages = origin.slot, origin.slot, origin.position, origin.pages
        origin.slot = origin.pages = None
        for name, array in self.small.inputs.arrays.items():
            if name != "canvas_rows":
                array[target] = array[source]
        self._copy(self._soft(target), self._soft(source), self.small.soft_row_bytes)

    # ------------------------------------------------------------ soft embeddings

    def keep_soft(self, first: int, rows: int) -> None:
        """Make the last step's soft embeddings of some rows those of the next."""
        offset, size = first * self.small.soft_row_bytes, rows * self.small.soft_row_bytes
        self._copy(self.small.soft + offset, self.small.next_soft + offset, size)

    def read_soft(self, slot: int) -> HostBytes:
        """The bits of a canvas's soft embedding; waits for the device."""
        device = self.shared.memory.device
        staging = device.host_bytes(self.small.soft_row_bytes)
        device.download(staging, self._soft(self._index(slot)))
        device.synchronize()
        bits = staging.copy()
        device.free_host_bytes(staging)
        return bits

    def write_soft(self, slot: int, bits: HostBytes) -> None:
        """The reverse."""
        device = self.shared.memory.device
        staging = device.host_bytes(self.small.soft_row_bytes)
        staging[:] = bits
        device.upload(self._soft(self._index(slot)), staging)
        device.synchronize()
        device.free_host_bytes(staging)

    def _soft(self, row: int) -> int:
        return self.small.soft + row * self.small.soft_row_bytes

    def _copy(self, target: int, source: int, nbytes: int) -> None:
        self.shared.memory.device.copy(Pitched(target, nbytes, 1), Pitched(source, nbytes, 1), (nbytes, 1, 1))

    def close(self) -> None:
        for call in self._calls.values():
            call.close()
        self._calls.clear()
        self._held.close()
