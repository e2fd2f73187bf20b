"""Device memory of calls: small inputs and results in one transfer each way, caches, new keys and values. Knows a
program's bindings; no canvas and no request.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

from dgemma_runtime.contract import sliding_slots
from dgemma_runtime.engines.bindings import CACHES, CALL_INPUTS, RESULTS, Bindings
from dgemma_runtime.engines.device import ALIGNMENT, STORAGE, Array, Device, HostBytes, Tensor
from dgemma_runtime.engines.kv_memory import Block, KvMemory

_SMALLEST_SLOTS = 128
_DOUBLED_SLOTS = 4096  # above, slots grow by so many


def smallest_slots(bindings: Bindings) -> int:
    """Slots below which the full layers' caches weigh little beside those of the sliding layers."""
    window = sliding_slots(bindings.spec)
    return min(max(_SMALLEST_SLOTS, 1 << max(window - 1, 0).bit_length()), bindings.largest_slots)


def slots_for(need: int, bindings: Bindings) -> int:
    """A power of two up to 4,096, then a multiple of 4,096: few shapes, so few captured graphs."""
    if need > _DOUBLED_SLOTS:
        return min(-(-need // _DOUBLED_SLOTS) * _DOUBLED_SLOTS, bindings.largest_slots)
    return min(max(smallest_slots(bindings), 1 << max(need - 1, 0).bit_length()), bindings.largest_slots)


class Transfer:
    """Small tensors of up to `rows` rows, `heads` canvas rows and `length` tokens a row: page-locked arrays and their
    place on the device, moved in one copy.
    """

    def __init__(
        self, device: Device, table: Mapping[str, tuple[str, str]], rows: int, heads: int, length: int
    ) -> None:
        self._device, self._table = device, table
        sizes = {"B": rows, "R": heads, "L": length}
        shapes = {name: tuple(sizes[axis] for axis in axes) for name, (_, axes) in table.items()}
        self._offsets: dict[str, int] = {}
        end = 0
        for name, shape in shapes.items():
            self._offsets[name] = end
            nbytes = math.prod(shape) * STORAGE[table[name][0]].itemsize
            end += max(-(-nbytes // ALIGNMENT), 1) * ALIGNMENT  # TensorRT wants an address for nothing, too
        with ExitStack() as held:
            self._host: HostBytes = device.host_bytes(end)
            held.callback(device.free_host_bytes, self._host)
            self._address = device.allocate(end, "the small inputs and results of a call")
            held.callback(device.free, self._address)
            self._held = held.pop_all()
        self.arrays: dict[str, Array] = {}
        for name, shape in shapes.items():
            storage, start = STORAGE[table[name][0]], self._offsets[name]
            nbytes = math.prod(shape) * storage.itemsize
            self.arrays[name] = self._host[start : start + nbytes].view(storage).reshape(shape)

    def tensors(self, rows: int, heads: int, length: int) -> dict[str, Tensor]:
        """For a call of the first rows; `length` may be less than the memory's where `rows` is 1."""
        sizes = {"B": rows, "R": heads, "L": length}
        return {
            name: Tensor(self._address + self._offsets[name], tuple(sizes[axis] for axis in axes))
            for name, (_, axes) in self._table.items()
        }

    def upload(self) -> None:
        self._device.upload(self._address, self._host)

    def download(self) -> None:
        self._device.download(self._host, self._address)

    def close(self) -> None:
        self.arrays.clear()
        self._held.close()


class CallMemory:
    """Inputs, results and soft embeddings of up to `rows` rows, up to `heads` of them canvases."""

    def __init__(self, device: Device, bindings: Bindings, rows: int, heads: int, length: int) -> None:
        self._hidden = bindings.spec.hidden_size
        self.soft_row_bytes = length * self._hidden * STORAGE[bindings.soft_dtype].itemsize
        soft_bytes = max(heads * self.soft_row_bytes, ALIGNMENT)
        with ExitStack() as held:
            self.inputs = Transfer(device, CALL_INPUTS, rows, heads, length)
            held.callback(self.inputs.close)
            self.results = Transfer(device, RESULTS, rows, heads, length)
            held.callback(self.results.close)
            self.soft = device.allocate(soft_bytes, "the soft embeddings")
            held.callback(device.free, self.soft)
            self.next_soft = device.allocate(soft_bytes, "the soft embeddings")
            held.callback(device.free, self.next_soft)
            self._held = held.pop_all()
        self.inputs.arrays["temperature"][:] = 1.0

    def tensors(self, rows: int, heads: int, length: int) -> dict[str, Tensor]:
        """All but keys and values."""
        shape = (heads, length, self._hidden)
        soft = {"soft_embedding": Tensor(self.soft, shape), "next_soft_embedding": Tensor(self.next_soft, shape)}
        return self.inputs.tensors(rows, heads, length) | self.results.tensors(rows, heads, length) | soft

    def close(self) -> None:
        self._held.close()


class FreshMemory:
    """Where calls put the keys and values of their own tokens, a region per group; calls take turns."""

    def __init__(self, memory: KvMemory, bindings: Bindings) -> None:
        self._memory = memory
        self._blocks: list[Block] = []
        for group in memory.groups:
            sizes = [Block(group, 0, bindings.max_batch_size, bindings.spec.canvas_length).nbytes]
            sizes += [Block(group, 0, 1, length).nbytes for length in range(1, bindings.max_encode_tokens + 1)]
            address = memory.device.allocate(max(sizes), "the keys and values that a call adds")
            self._blocks.append(Block(group, address, 1, 1))

    def blocks(self, rows: int, length: int) -> list[Block]:
        """For a call of `rows` rows of `length` tokens."""
        return [replace(block, rows=rows, slots=length) for block in self._blocks]

    def close(self) -> None:
        free_blocks(self._memory, self._blocks)


def allocate_blocks(memory: KvMemory, rows: int, slots: int) -> list[Block]:
    """Caches of every group, `slots` is of the full layers; all or nothing."""
    blocks: list[Block] = []
    try:
        for group in memory.groups:
            block = Block(group, 0, rows, memory.slots(group, slots))
            purpose = f"the {group.kind} layers' caches, {rows} rows of {block.slots} slots"
            blocks.append(replace(block, address=memory.device.allocate(block.nbytes, purpose)))
    except BaseException:
        free_blocks(memory, blocks)
        raise
    return blocks


def free_blocks(memory: KvMemory, blocks: list[Block]) -> None:
    while blocks:
        memory.device.free(blocks.pop().address)


def cache_tensors(bindings: Bindings, caches: Sequence[Block], fresh: Sequence[Block], rows: int) -> dict[str, Tensor]:
    """The first `rows` rows of the caches, and where new keys and values go."""
    tensors = {}
    for cache, new in zip(caches, fresh, strict=True):
        group = cache.group
        added_shape = (rows, group.kv_heads, new.slots, group.head_dim)
        for place, (layer, which) in enumerate(group.tensors):
            name, added = CACHES[which]
            shape = bindings.cache_shape(bindings.spec.layers[layer], rows, cache.slots)
            tensors[f"{name}_{layer}"] = Tensor(cache.tensor(place), shape)
            tensors[f"{added}_{layer}"] = Tensor(new.tensor(place), added_shape)
    return tensors
