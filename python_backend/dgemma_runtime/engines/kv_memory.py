"""Keys and values in device memory: page pools, caches laid out for a call, and copies between them. Knows no program.

Keys and values of one kind of layer, shape and type form a group. A page of a group is [tensors, kv_heads, page_size,
head_dim], a block [tensors, rows, kv_heads, slots, head_dim], so any span of tokens of one page goes to or from one row
of a block in a single copy, whatever the number of layers. The tensors are, of each layer, the keys, then the values;
or one of the two, where their types differ.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from dgemma_runtime.contract import (
    FULL,
    SLIDING,
    EngineLimits,
    ModelSpec,
    SequencePages,
    cache_dtypes,
    sliding_slots,
)
from dgemma_runtime.engines.device import ALIGNMENT, STORAGE, Device, HostBytes, Pitched
from dgemma_runtime.engines.row_content import RowContent, Versions, page_spans, page_tokens

KEYS, VALUES = 0, 1  # places in what `cache_dtypes` gives


@dataclass(frozen=True)
class Group:
    """Keys and values of layers of one kind that have one shape and one type."""

    kind: str
    kv_heads: int
    head_dim: int
    dtype: str  # a key of STORAGE
    tensors: tuple[tuple[int, int], ...]  # layer, and KEYS or VALUES

    @property
    def token_bytes(self) -> int:
        """Of one head of one tensor."""
        return self.head_dim * STORAGE[self.dtype].itemsize

    @property
    def page_token_bytes(self) -> int:
        """Of one token in all tensors."""
        return len(self.tensors) * self.kv_heads * self.token_bytes


def layer_groups(spec: ModelSpec, kv_dtype: str) -> tuple[Group, ...]:
    """In the order of their first layers."""
    members: dict[tuple[str, int, int, str], list[tuple[int, int]]] = {}
    for index, layer in enumerate(spec.layers):
        for which, dtype in zip((KEYS, VALUES), cache_dtypes(kv_dtype, layer), strict=True):
            shape = (layer.kind, layer.num_key_value_heads, layer.head_dim, dtype)
            members.setdefault(shape, []).append((index, which))
    return tuple(Group(*shape, tuple(tensors)) for shape, tensors in members.items())


@dataclass(frozen=True)
class Block:
    """Caches of one group, [tensors, rows, kv_heads, slots, head_dim] at `address`; every tensor is aligned."""

    group: Group
    address: int
    rows: int
    slots: int

    @property
    def pitch(self) -> int:
        """Bytes of one head of one row."""
        return self.slots * self.group.token_bytes

    @property
    def planes(self) -> int:
        """Heads of all rows, and as many more as alignment takes."""
        step = ALIGNMENT // math.gcd(ALIGNMENT, self.pitch)
        return -(-self.rows * self.group.kv_heads // step) * step

    @property
    def nbytes(self) -> int:
        return len(self.group.tensors) * self.planes * self.pitch

    def tensor(self, number: int) -> int:
        """Address of one of the group's tensors."""
        return self.address + number * self.planes * self.pitch

    def at(self, row: int, token: int) -> Pitched:
        """One row from one token on, of all tensors."""
        offset = row * self.group.kv_heads * self.pitch + token * self.group.token_bytes
        return Pitched(self.address + offset, self.pitch, self.planes)


@dataclass(frozen=True)
class Added:
    """Tokens that a call adds to a sequence: the call's row they stand in, and where they belong."""

    row: int
    position: int  # tokens of the sequence before them
    count: int
    pages: SequencePages


class KvMemory:
    """The page pools, and what is copied between them and blocks. `blocks` are one per group, in order."""

    def __init__(self, device: Device, spec: ModelSpec, kv_dtype: str, limits: EngineLimits) -> None:
        self.device, self.spec, self.limits = device, spec, limits
        self.groups = layer_groups(spec, kv_dtype)
        self._page_bytes = [group.page_token_bytes * limits.page_size for group in self.groups]
        self._versions: Versions = np.zeros(limits.full_pages, np.int64)
        self._pools: list[int] = []
        for group, size in zip(self.groups, self._page_bytes, strict=True):
            pages = limits.sliding_pages if group.kind == SLIDING else limits.full_pages
            self._pools.append(device.allocate(pages * size, f"{pages} pages of the {group.kind} layers"))

    def close(self) -> None:
        while self._pools:
            self.device.free(self._pools.pop())

    def sliding_length(self, position: int) -> int:
        """Tokens of a context that sliding layers see."""
        return min(position, self.spec.sliding_window - 1)

    def slots(self, group: Group, full_slots: int) -> int:
        """Of a cache of this group."""
        return full_slots if group.kind == FULL else sliding_slots(self.spec)

    # ------------------------------------------------------------ copies

    def lay_out(
        self, blocks: Sequence[Block], row: int, position: int, pages: SequencePages, content: RowContent
    ) -> None:
        """Make a row hold `position` tokens of context; copies of full pages that are still good are left alone."""
        size = self.limits.page_size
        tokens = page_tokens(position, size)
        count = len(tokens)
        chosen = pages.full[:count]
        if any(group.kind == FULL for group in self.groups):
            stale = content.stale(position, pages.full, self._versions)
            for index in np.flatnonzero(stale).tolist():
                self._copy_pages(blocks, FULL, row, int(chosen[index]), 0, index * size, int(tokens[index]))
            content.pages[:count], content.versions[:count] = chosen, self._versions[chosen]
            content.tokens[:count][stale] = tokens[stale]
        start = position - self.sliding_length(position)
        for first, last in page_spans(start, position, size):
            page = int(pages.sliding[first // size])
            self._copy_pages(blocks, SLIDING, row, page, first % size, first - start, last - first)

    def store(self, fresh: Sequence[Block], added: Added) -> None:
        """Copy the keys and values of new tokens from `fresh` to their pages."""
        size, pages = self.limits.page_size, added.pages
        for first, last in page_spans(added.position, added.position + added.count, size):
            for group, pool, page_bytes, block in self._together(fresh):
                page = int((pages.full if group.kind == FULL else pages.sliding)[first // size])
                if page < 0:  # a chunk longer than the window fills sliding pages that are gone already
                    continue
                extent = ((last - first) * group.token_bytes, group.kv_heads, len(group.tensors))
                target = self._page(group, pool + page * page_bytes, first % size)
                self.device.copy(target, block.at(added.row, first - added.position), extent)
            self._versions[pages.full[first // size]] += 1

    def append(self, fresh: Sequence[Block], blocks: Sequence[Block], added: Added, content: RowContent) -> None:
        """`store`, and the full layers' also behind the context that their row of `blocks` holds, all of it good.

        So they are laid out. Sliding layers' contexts move on, and are laid out again.
        """
        size = self.limits.page_size
        for new, block in zip(fresh, blocks, strict=True):
            if new.group.kind == FULL:
                extent = (added.count * new.group.token_bytes, new.group.kv_heads, len(new.group.tensors))
                self.device.copy(block.at(added.row, added.position), new.at(added.row, 0), extent)
        self.store(fresh, added)
        for first, last in page_spans(added.position, added.position + added.count, size):
            index, page = first // size, int(added.pages.full[first // size])
            content.pages[index], content.versions[index] = page, self._versions[page]
            content.tokens[index] = last - index * size

    def move(self, blocks: Sequence[Block], source: int, target: int, position: int) -> None:
        """Copy a row's `position` tokens of context to another row."""
        for block in blocks:
            count = position if block.group.kind == FULL else self.sliding_length(position)
            if count:
                extent = (count * block.group.token_bytes, block.group.kv_heads, len(block.group.tensors))
                self.device.copy(block.at(target, 0), block.at(source, 0), extent)

    def _copy_pages(
        self, blocks: Sequence[Block], kind: str, row: int, page: int, token: int, slot: int, count: int
    ) -> None:
        """`count` tokens of a page, from `token` on, to a row's slots from `slot` on; in every group of a kind."""
        for group, pool, page_bytes, block in self._together(blocks):
            if group.kind == kind:
                assert page >= 0, f"the {kind} layers' page within reach of a context was given back"
                extent = (count * group.token_bytes, group.kv_heads, len(group.tensors))
                source = self._page(group, pool + page * page_bytes, token)
                self.device.copy(block.at(row, slot), source, extent)

    def _together(self, blocks: Sequence[Block]) -> Iterable[tuple[Group, int, int, Block]]:
        return zip(self.groups, self._pools, self._page_bytes, blocks, strict=True)

    def _page(self, group: Group, address: int, token: int) -> Pitched:
        return Pitched(address + token * group.token_bytes, self.limits.page_size * group.token_bytes, group.kv_heads)

    # ------------------------------------------------------------ inspection

    def page_bytes(self, layer: int, which: int, page: int) -> HostBytes:
        """A copy of one layer's KEYS or VALUES in a page, [kv_heads, page_size, head bytes]; waits for the device."""
        number = next(index for index, group in enumerate(self.groups) if (layer, which) in group.tensors)
        group = self.groups[number]
        shape = (group.kv_heads, self.limits.page_size, group.token_bytes)
        part = self.device.host_bytes(math.prod(shape))
        address = self._pools[number] + page * self._page_bytes[number]
        self.device.download(part, address + group.tensors.index((layer, which)) * part.nbytes)
        self.device.synchronize()
        values: HostBytes = part.reshape(shape).copy()
        self.device.free_host_bytes(part)
        return values
