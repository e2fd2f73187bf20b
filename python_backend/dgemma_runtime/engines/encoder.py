"""Encodes clean tokens causally, one row at a time: context laid out, one run, new keys and values to the pages. Knows
no canvas.
"""

from __future__ import annotations

from contextlib import ExitStack

from dgemma_runtime.contract import EncodeRow
from dgemma_runtime.engines.bindings import ENCODE
from dgemma_runtime.engines.call_memory import (
    CallMemory,
    allocate_blocks,
    cache_tensors,
    free_blocks,
    slots_for,
    smallest_slots,
)
from dgemma_runtime.engines.kv_memory import Added, Block
from dgemma_runtime.engines.row_content import RowContent
from dgemma_runtime.engines.workspace import Shared


class Encoder:
    """One row's caches, which remember what they hold: the next chunk of the same prompt adds only the last one's."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._slots = self._allocated = smallest_slots(shared.bindings)
        device = shared.memory.device
        with ExitStack() as held:
            self._small = CallMemory(device, shared.bindings, 1, 0, shared.bindings.max_encode_tokens)
            held.callback(self._small.close)
            self._context = shared.program.context(ENCODE)
            held.callback(self._context.close)
            self._memory = allocate_blocks(shared.memory, 1, self._slots)
            held.callback(lambda: free_blocks(shared.memory, self._memory))
            self._held = held.pop_all()
        self._content = RowContent(self._slots, shared.memory.limits.page_size)

    def encode(self, row: EncodeRow) -> None:
        """Queue, run and wait. Raises OutOfMemory before anything is written."""
        memory, length = self._shared.memory, len(row.token_ids)
        inputs = self._small.inputs.arrays
        inputs["token_ids"][0, :length] = row.token_ids
        inputs["position"][0] = row.position
        inputs["sliding_length"][0] = memory.sliding_length(row.position)
        caches, fresh = self._caches(row.position), self._shared.fresh.blocks(1, length)
        self._small.inputs.upload()
        memory.lay_out(caches, 0, row.position, row.pages, self._content)
        tensors = cache_tensors(self._shared.bindings, caches, fresh, 1)
        self._context.bind(self._small.tensors(1, 0, length) | tensors)
        self._context.enqueue()
        memory.store(fresh, Added(0, row.position, length, row.pages))
        memory.device.synchronize()

    def _caches(self, position: int) -> list[Block]:
        """For a context of `position` tokens: about as many slots, as masked ones take time, too."""
        bindings, need = self._shared.bindings, max(position, 1)
        fits = need <= self._slots <= max(2 * need, smallest_slots(bindings))
        slots = self._slots if fits else slots_for(need, bindings)
        if slots > self._allocated:
            free_blocks(self._shared.memory, self._memory)
            self._allocated = self._slots = 0  # should there be no memory for more, nothing of what was there is left
            self._memory = allocate_blocks(self._shared.memory, 1, slots)
            self._allocated = slots
        if slots != self._slots:  # what is there lies elsewhere with another number of slots
            self._slots, self._content = slots, RowContent(slots, self._shared.memory.limits.page_size)
        # In memory for more slots, `_slots` of them lie side by side.
        return [
            Block(block.group, block.address, 1, self._shared.memory.slots(block.group, self._slots))
            for block in self._memory
        ]

    def close(self) -> None:
        self._held.close()
