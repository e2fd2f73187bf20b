"""KV pages: who holds which, and which still hold a prefix worth finding. Knows no keys, no values and no engine.

Two groups of layers have their own pages. The full-attention layers keep every position of a sequence. The sliding
layers keep only what some later token can still see: at context length n that is the positions from
n - (sliding_window - 1) on, for the canvas as for the next encoded token. Older pages are given back.

Pages are counted by references. A complete page may be published under a key that stands for all tokens up to its end;
while it is, other sequences can share it, and when nobody holds it any more it stays until its place is needed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from dgemma_runtime.contract import EngineLimits, Int32Array, SequencePages

NOT_HELD = -1  # in SequencePages


class PagePool:
    """The pages 0 .. num_pages - 1 of one group of layers.

    A page is free, held by one sequence or more, or idle: published and held by nobody. Idle pages are taken where no
    free ones are left: first those given back as passing, then the others, of each the least recently held.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.evictions = 0  # published pages that were taken
        self.holds = 0  # of pages by sequences; a shared page counts as often as it is held
        self._free = list(range(num_pages - 1, -1, -1))
        self._references = [0] * num_pages
        self._idle: tuple[OrderedDict[int, None], ...] = (OrderedDict(), OrderedDict())  # passing, kept
        self._pages: dict[bytes, int] = {}  # by key
        self._keys: dict[int, bytes] = {}  # by page
        self._exact: set[int] = set()  # published pages that are, see `publish`
        self._unreserved = num_pages

    @property
    def available(self) -> int:
        """Pages that can be taken."""
        return len(self._free) + self.idle

    @property
    def idle(self) -> int:
        """Pages that nobody holds and that can still be found."""
        return sum(len(pages) for pages in self._idle)

    @property
    def used(self) -> int:
        """Pages that sequences hold."""
        return self.num_pages - self.available

    # ------------------------------------------------------------ holding

    @property
    def unreserved(self) -> int:
        """Pages that a new sequence may still reserve."""
        return self._unreserved

    def reserve(self, pages: int) -> None:
        """So many can be taken later on; only for pools of which all users reserve."""
        assert 0 <= pages <= self._unreserved
        self._unreserved -= pages

    def unreserve(self, pages: int) -> None:
        self._unreserved += pages
        assert self._unreserved <= self.num_pages

    def take(self, pages: int) -> Int32Array:
        """[pages] that are available, held once."""
        assert pages <= self.available
        while len(self._free) < pages:
            self._evict()
        taken = self._free[len(self._free) - pages :][::-1]
        del self._free[len(self._free) - pages :]
        for page in taken:
            self._references[page] = 1
        self.holds += pages
        return np.array(taken, dtype=np.int32)

    def share(self, pages: Iterable[int]) -> None:
        """Hold published pages once more."""
        for page in pages:
            if not self._references[page]:
                self._remove_idle(page)
            self._references[page] += 1
            self.holds += 1

    def give_back(self, pages: Iterable[int], keep: bool = True) -> None:
        """Hold them once less. With `keep` they outlive passing ones; give the most valuable back last."""
        for page in pages:
            self._references[page] -= 1
            self.holds -= 1
            assert self._references[page] >= 0
            if self._references[page]:
                continue
            if page in self._keys:
                self._idle[keep][page] = None
            else:
                self._free.append(page)

    # ------------------------------------------------------------ finding

    def publish(self, page: int, key: bytes, exact: bool) -> None:
        """A page that is held can be found by its key from now on, unless another one already can.

        `exact`: its content was computed in the pieces in which a sequence alone on the engine would compute it, so it
        has the same bits. Such a page replaces one that is not.
        """
        assert self._references[page] > 0
        other = self._pages.get(key)
        if other is not None and (not exact or other in self._exact):
            return
        if other is not None:
            self._forget(other)
            if not self._references[other]:
                self._remove_idle(other)
                self._free.append(other)
        self._pages[key], self._keys[page] = page, key
        if exact:
            self._exact.add(page)

    def find(self, key: bytes, exact: bool = False) -> int | None:
        """The page published under a key; with `exact` only one that is."""
        page = self._pages.get(key)
        return None if page is None or (exact and page not in self._exact) else page

    def is_exact(self, page: int) -> bool:
        return page in self._exact

    def _evict(self) -> None:
        pages = self._idle[0] or self._idle[1]
        page, _ = pages.popitem(last=False)
        self._forget(page)
        self._free.append(page)
        self.evictions += 1

    def _forget(self, page: int) -> None:
        del self._pages[self._keys.pop(page)]
        self._exact.discard(page)

    def _remove_idle(self, page: int) -> None:
        for pages in self._idle:
            pages.pop(page, None)

    def check(self) -> None:
        """Assert what always holds."""
        idle = [page for pages in self._idle for page in pages]
        held = [page for page, count in enumerate(self._references) if count]
        assert sorted([*self._free, *idle, *held]) == list(range(self.num_pages))
        assert {page: key for key, page in self._pages.items()} == self._keys
        assert all(page in self._keys for page in idle)
        assert not any(page in self._keys for page in self._free)
        assert self._exact <= self._keys.keys()
        assert self.holds == sum(self._references)


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

    def window_start(self, tokens: int) -> int:
        """Index of the first page that what follows `tokens` cached ones can see in sliding layers."""
        return max(0, tokens - (self.sliding_window - 1)) // self.page_size

    def need(self, cached_tokens: int) -> PageNeed:
        """Of a sequence with at most `cached_tokens` in the cache.

        The sliding layers hold, while a chunk is encoded, the window before it and the chunk; these positions may
        begin and end anywhere within a page.
        """
        full = self.pages(cached_tokens)
        span = self.sliding_window - 1 + self.max_encode_tokens
        return PageNeed(full, min(full, (span + self.page_size - 2) // self.page_size + 1))


@dataclass(frozen=True)
class Prefix:
    """Published pages that begin a sequence: all full ones, and the sliding ones of the window behind them."""

    full: Int32Array  # [pages]
    sliding: Int32Array  # [pages]; NOT_HELD before the window
    exact: bool = False  # all of them

    @staticmethod
    def none() -> Prefix:
        return Prefix(np.empty(0, np.int32), np.empty(0, np.int32))

    @property
    def pages(self) -> int:
        return len(self.full)


class PageTable:
    """The pages of one sequence, from its admission to `release`.

    Full pages are taken where they are available. Of sliding ones it reserves the most that it holds at once, so it
    never lacks one.
    """

    def __init__(
        self, full: PagePool, sliding: PagePool, rules: PageRules, need: PageNeed, prefix: Prefix | None = None
    ) -> None:
        prefix = prefix or Prefix.none()
        self._full_pool, self._sliding_pool = full, sliding
        self._rules, self._need = rules, need
        self._ahead = np.empty(0, np.int32)  # full pages for tokens that are still to come
        self._first_sliding = rules.window_start(prefix.pages * rules.page_size)  # the first page still held
        self._published = prefix.pages
        self._boundaries: set[int] = set()
        self.view = SequencePages(full=prefix.full, sliding=prefix.sliding)  # never changed in place
        sliding.reserve(need.sliding)
        full.share(prefix.full.tolist())
        sliding.share(prefix.sliding[self._first_sliding :].tolist())

    def missing(self, tokens: int) -> int:
        """Full pages to take before the positions 0 .. tokens - 1 have theirs."""
        return max(0, self._rules.pages(tokens) - len(self.view.full) - len(self._ahead))

    def take(self, tokens: int) -> None:
        """Take the full pages that are missing; they are available."""
        if missing := self.missing(tokens):
            self._ahead = np.concatenate([self._ahead, self._full_pool.take(missing)])

    def extend(self, tokens: int) -> None:
        """Make room for the positions 0 .. tokens - 1."""
        self.take(tokens)
        added = self._rules.pages(tokens) - len(self.view.full)
        if added <= 0:
            return
        full = np.concatenate([self.view.full, self._ahead[:added]])
        sliding = np.concatenate([self.view.sliding, self._sliding_pool.take(added)])
        self._ahead = self._ahead[added:]
        self.view = SequencePages(full=full, sliding=sliding)
        assert len(full) <= self._need.full
        assert len(sliding) - self._first_sliding <= self._need.sliding

    def keep_window(self, pages: int) -> None:
        """The sliding window behind so many pages is likely to be asked for again."""
        if pages:
            self._boundaries.add(pages)

    def publish(self, keys: list[bytes], cached_tokens: int, exact_tokens: int) -> None:
        """Let others find the pages that are complete with `cached_tokens`; the first `exact_tokens` are exact."""
        size = self._rules.page_size
        for index in range(self._published, min(cached_tokens // size, len(keys))):
            exact = (index + 1) * size <= exact_tokens
            self._full_pool.publish(int(self.view.full[index]), keys[index], exact)
            if index >= self._first_sliding:
                self._sliding_pool.publish(int(self.view.sliding[index]), keys[index], exact)
            self._published = index + 1

    def trim(self, cached_tokens: int) -> None:
        """Give back the sliding pages that nothing after `cached_tokens` tokens can see."""
        first = min(self._rules.window_start(cached_tokens), len(self.view.sliding))
        if first <= self._first_sliding:
            return
        sliding = self.view.sliding.copy()
        for index in range(self._first_sliding, first):
            self._sliding_pool.give_back([int(sliding[index])], keep=self._is_kept(index))
        sliding[self._first_sliding : first] = NOT_HELD
        self._first_sliding = first
        self.view = SequencePages(full=self.view.full, sliding=sliding)

    def release(self) -> None:
        """Give everything back; the table is not to be used again. The beginning of a sequence stays longest."""
        self._full_pool.give_back([*self._ahead.tolist(), *self.view.full[::-1].tolist()])
        self._sliding_pool.give_back(self.view.sliding[self._first_sliding :][::-1].tolist())
        self._sliding_pool.unreserve(self._need.sliding)
        self._ahead = np.empty(0, np.int32)
        self.view = SequencePages(full=np.empty(0, np.int32), sliding=np.empty(0, np.int32))
        self._first_sliding = self._published = 0
        self._need = PageNeed(0, 0)

    def _is_kept(self, index: int) -> bool:
        size = self._rules.page_size
        return any(self._rules.window_start(end * size) <= index < end for end in self._boundaries)
