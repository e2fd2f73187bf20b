"""Finds the longest cached prefix of a sequence, by content. Knows pages, no engine and no request."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dgemma_runtime.contract import Int32Array
from dgemma_runtime.pages import NOT_HELD, PagePool, PageRules, Prefix

_DIGEST_BYTES = 16  # of BLAKE2b: far too many to meet a second text with the same one


class PageKeys:
    """Keys of a sequence's complete pages. A key stands for the salt and all tokens up to the end of its page."""

    def __init__(self, page_size: int, salt: str) -> None:
        self._page_size = page_size
        self._last = hashlib.blake2b(salt.encode(), digest_size=_DIGEST_BYTES).digest()
        self.keys: list[bytes] = []

    def extend(self, tokens: Int32Array) -> None:
        """`tokens` [n] are all of the sequence, those of before included; adds the keys of pages now complete."""
        size = self._page_size
        data = np.ascontiguousarray(tokens, np.int32)
        for index in range(len(self.keys), len(tokens) // size):
            page = data[index * size : (index + 1) * size]
            self._last = hashlib.blake2b(self._last + page.tobytes(), digest_size=_DIGEST_BYTES).digest()
            self.keys.append(self._last)


@dataclass(frozen=True)
class Match:
    """What is cached of a sequence."""

    prefix: Prefix
    full_pages: int  # that begin it; those beyond the prefix are of no use, as the window behind them is gone


def find_prefix(full: PagePool, sliding: PagePool, rules: PageRules, keys: Sequence[bytes], grid: int = 0) -> Match:
    """The longest prefix whose full pages are all published, and the sliding pages of the window at its end.

    With a `grid` (tokens) only exact pages count, and prefixes that end on it.
    """
    exact = grid > 0
    full_pages, sliding_pages = [], []
    for key in keys:
        page = full.find(key, exact)
        if page is None:
            break
        full_pages.append(page)
        sliding_pages.append(sliding.find(key, exact))
    length, run = 0, 0  # pages; published sliding pages without a gap, up to here
    for end, page in enumerate(sliding_pages, 1):
        run = 0 if page is None else run + 1
        on_grid = not exact or end * rules.page_size % grid == 0
        if on_grid and run >= end - rules.window_start(end * rules.page_size):
            length = end
    first = rules.window_start(length * rules.page_size)
    held = [NOT_HELD if page is None or index < first else page for index, page in enumerate(sliding_pages[:length])]
    all_exact = all(full.is_exact(page) for page in full_pages[:length]) and all(
        sliding.is_exact(page) for page in held if page != NOT_HELD
    )
    prefix = Prefix(np.array(full_pages[:length], np.int32), np.array(held, np.int32), all_exact)
    return Match(prefix, len(full_pages))
