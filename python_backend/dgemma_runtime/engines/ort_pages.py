"""Pages of keys and values in ordinary memory, and copies between them and rows of caches. Knows no library, no canvas.

A row's caches are, per layer, its keys and its values, each [kv_heads, slots, head_dim]. Full layers hold the context
from slot 0 on, sliding layers its tail, what the window leaves of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from dgemma_runtime.contract import SLIDING, EngineLimits, Int32Array, ModelSpec, SequencePages
from dgemma_runtime.engines.row_content import RowContent, Versions, page_spans, page_tokens

Float32Array = npt.NDArray[np.float32]
RowCaches = Sequence[tuple[Float32Array, Float32Array]]  # keys and values by layer


class PagePools:
    """Of each layer the keys and the values of all pages, each [kv_heads, pages, page_size, head_dim]."""

    def __init__(self, spec: ModelSpec, limits: EngineLimits) -> None:
        self._spec, self._size = spec, limits.page_size
        self._pools = []
        for layer in spec.layers:
            pages = limits.sliding_pages if layer.kind == SLIDING else limits.full_pages
            shape = (layer.num_key_value_heads, pages, limits.page_size, layer.head_dim)
            self._pools.append((np.zeros(shape, np.float32), np.zeros(shape, np.float32)))
        self._versions: Versions = np.zeros(limits.full_pages, np.int64)

    def sliding_length(self, position: int) -> int:
        """Tokens of a context that sliding layers see."""
        return min(position, self._spec.sliding_window - 1)

    def good_tokens(self, content: RowContent, position: int, pages: SequencePages) -> int:
        """How many of the first `position` tokens a row holds already."""
        stale = content.stale(position, pages.full, self._versions)
        return int(page_tokens(position, self._size)[~stale].sum())

    def lay_out(self, caches: RowCaches, content: RowContent, position: int, pages: SequencePages) -> None:
        """Make a row hold `position` tokens of context, to be written behind; full pages that are good stay."""
        tokens = page_tokens(position, self._size)
        count = len(tokens)
        stale = np.flatnonzero(content.stale(position, pages.full, self._versions))
        content.pages[stale] = -1
        content.pages[count:] = -1  # what follows the context is about to be overwritten
        for first, last in _runs(stale):
            stop = min(last * self._size, position)
            for (layer, *pools), row in self._together(caches):
                if layer != SLIDING:
                    for pool, cache in zip(pools, row, strict=True):
                        _gather(pool, pages.full[first:last], cache[:, first * self._size : stop])
        content.pages[:count], content.versions[:count] = pages.full[:count], self._versions[pages.full[:count]]
        content.tokens[:count] = tokens
        self._lay_out_sliding(caches, position, pages.sliding)

    def _lay_out_sliding(self, caches: RowCaches, position: int, pages: Int32Array) -> None:
        start = position - self.sliding_length(position)
        for first, last in page_spans(start, position, self._size):
            page, offset = int(pages[first // self._size]), first % self._size
            assert page >= 0, "a page within a context's window was given back"
            for (layer, *pools), row in self._together(caches):
                if layer == SLIDING:
                    for pool, cache in zip(pools, row, strict=True):
                        cache[:, first - start : last - start] = pool[:, page, offset : offset + last - first]

    def store(self, caches: RowCaches, content: RowContent, position: int, length: int, pages: SequencePages) -> None:
        """Copy what a call has written behind `position` tokens of context, `length` tokens, to their pages."""
        size, tail = self._size, self.sliding_length(position)
        for first, last in page_spans(position, position + length, size):
            for (layer, *pools), row in self._together(caches):
                page = int((pages.sliding if layer == SLIDING else pages.full)[first // size])
                if page < 0:  # a chunk longer than the window fills sliding pages that are gone already
                    continue
                slot = first - position + (tail if layer == SLIDING else position)
                for pool, cache in zip(pools, row, strict=True):
                    pool[:, page, first % size : first % size + last - first] = cache[:, slot : slot + last - first]
            self._versions[pages.full[first // size]] += 1
        tokens = page_tokens(position + length, size)
        written = slice(position // size, len(tokens))
        content.pages[written], content.tokens[written] = pages.full[written], tokens[written]
        content.versions[written] = self._versions[pages.full[written]]

    def keys_values(self, layer: int, pages: SequencePages, start: int, stop: int) -> tuple[Float32Array, Float32Array]:
        """K and V of one layer for positions [start, stop), each [stop - start, kv_heads, head_dim]."""
        chosen = pages.sliding if self._spec.layers[layer].kind == SLIDING else pages.full
        positions = np.arange(start, stop)
        where = chosen[positions // self._size], positions % self._size
        keys, values = (pool[:, where[0], where[1]].transpose(1, 0, 2) for pool in self._pools[layer])
        return keys, values

    def _together(
        self, caches: RowCaches
    ) -> Iterator[tuple[tuple[str, Float32Array, Float32Array], tuple[Float32Array, Float32Array]]]:
        for layer, pools, row in zip(self._spec.layers, self._pools, caches, strict=True):
            yield (layer.kind, *pools), row


def _gather(pool: Float32Array, pages: Int32Array, target: Float32Array) -> None:
    """Copy `pages` from their first token on to target [kv_heads, n, head_dim]; the last page may be wanted in part."""
    size, dim = pool.shape[2:]
    whole = target.shape[1] // size
    for source, part in zip(pool, target, strict=True):
        # with another mode numpy would copy by way of a buffer
        np.take(source, pages[:whole], axis=0, out=part[: whole * size].reshape(whole, size, dim), mode="clip")
        if rest := part.shape[0] - whole * size:
            part[whole * size :] = source[pages[whole], :rest]


def _runs(indices: npt.NDArray[np.intp]) -> Iterator[tuple[int, int]]:
    """Runs [first, last) of consecutive numbers."""
    borders = np.flatnonzero(np.diff(indices) > 1) + 1
    for run in np.split(indices, borders):
        if len(run):
            yield int(run[0]), int(run[-1]) + 1
