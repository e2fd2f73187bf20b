"""Accounting of KV pages: who holds which. Knows no keys, no values and no engine.

Two groups of layers have their own pages. The full-attention layers keep every position of a sequence. The sliding
layers keep only what some later token can still see: at context length n that is the positions from
n - (sliding_window - 1) on, for the canvas as for the next encoded token. Older pages go back to the pool.

A sequence reserves, when it is admitted, as many pages of each group as it will ever hold at once; it takes them as
it grows. So a running sequence never lacks a page, and what is not written is not touched.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dgemma_runtime.contract import EngineLimits, Int32Array, SequencePages


class PagePool:
    """The pages 0 .. num_pages - 1 of one group of layers. The page given back last is taken first."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._unreserved = num_pages

    @property
    def unreserved(self) -> int:
        """Pages that a new sequence may still reserve."""
        return self._unreserved

    @property
    def used(self) -> int:
        """Pages that sequences hold."""
        return self.num_pages - len(self._free)

    def reserve(self, pages: int) -> None:
        assert 0 <= pages <= self._unreserved
        self._unreserved -= pages

    def unreserve(self, pages: int) -> None:
        self._unreserved += pages
        assert self._unreserved <= self.num_pages

    def take(self, pages: int) -> Int32Array:
        """[pages]; the caller has them reserved, so they are there."""
        assert pages <= len(self._free)
        taken = self._free[len(self._free) - pages :][::-1]
        del self._free[len(self._free) - pages :]
        return np.array(taken, dtype=np.int32)

    def give_back(self, pages: Int32Array) -> None:
        self._free.extend(pages[::-1].tolist())
        assert len(self._free) <= self.num_pages


@dataclass(frozen=True)
class PageNeed:
    """How many pages of each group a sequence holds at once, at most."""

    full: int
    sliding: int


@dataclass(frozen=True)
class PageRules:
    """What determines a sequence's need: all in tokens."""

    page_size: int
    sliding_window: int
    max_encode_tokens: int  # encoded at once

    @staticmethod
    def of(limits: EngineLimits, sliding_window: int) -> PageRules:
        return PageRules(limits.page_size, sliding_window, limits.max_encode_tokens)

    def pages(self, tokens: int) -> int:
        """Pages of the positions 0 .. tokens - 1."""
        return -(-tokens // self.page_size)

    def need(self, cached_tokens: int) -> PageNeed:
        """Of a sequence with at most `cached_tokens` in the cache.

        The sliding layers hold, while a chunk is encoded, the window before it and the chunk; these positions may
        begin and end anywhere within a page.
        """
        full = self.pages(cached_tokens)
        span = self.sliding_window - 1 + self.max_encode_tokens
        return PageNeed(full, min(full, (span + self.page_size - 2) // self.page_size + 1))


class PageTable:
    """The pages of one sequence, from its admission to `release`."""

    def __init__(self, full: PagePool, sliding: PagePool, rules: PageRules, need: PageNeed) -> None:
        self._full_pool, self._sliding_pool = full, sliding
        self._rules, self._need = rules, need
        self._first_sliding = 0  # index of the first sliding page still held
        self.view = SequencePages(full=np.empty(0, np.int32), sliding=np.empty(0, np.int32))  # never changed in place
        full.reserve(need.full)
        sliding.reserve(need.sliding)

    def extend(self, tokens: int) -> None:
        """Make room for the positions 0 .. tokens - 1."""
        missing = self._rules.pages(tokens) - len(self.view.full)
        if missing <= 0:
            return
        full = np.concatenate([self.view.full, self._full_pool.take(missing)])
        sliding = np.concatenate([self.view.sliding, self._sliding_pool.take(missing)])
        self.view = SequencePages(full=full, sliding=sliding)
        assert len(full) <= self._need.full
        assert len(sliding) - self._first_sliding <= self._need.sliding

    def trim(self, context_length: int) -> None:
        """Give back the sliding pages that nothing after `context_length` cached tokens can see."""
        first = max(0, context_length - (self._rules.sliding_window - 1)) // self._rules.page_size
        first = min(first, len(self.view.sliding))
        if first <= self._first_sliding:
            return
        sliding = self.view.sliding.copy()
        self._sliding_pool.give_back(sliding[self._first_sliding : first])
        sliding[self._first_sliding : first] = -1
        self._first_sliding = first
        self.view = SequencePages(full=self.view.full, sliding=sliding)

    def release(self) -> None:
        """Give everything back; the table is not to be used again."""
        self._full_pool.give_back(self.view.full)
        self._sliding_pool.give_back(self.view.sliding[self._first_sliding :])
        self._full_pool.unreserve(self._need.full)
        self._sliding_pool.unreserve(self._need.sliding)
        self.view = SequencePages(full=np.empty(0, np.int32), sliding=np.empty(0, np.int32))
        self._first_sliding = 0
        self._need = PageNeed(0, 0)
