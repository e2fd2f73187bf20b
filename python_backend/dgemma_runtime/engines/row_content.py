"""Which full-layer pages a row of caches holds copies of, and which of them are still good. Knows no memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from dgemma_runtime.contract import Int32Array

Versions = npt.NDArray[np.int64]  # of all pages: counts the writes, so same page and version is same content


class RowContent:
    """Of each page of a row's context: which one it is a copy of, of which version, and how many tokens of it."""

    def __init__(self, slots: int, page_size: int) -> None:
        pages = -(-slots // page_size)
        self._size = page_size
        self.pages = np.full(pages, -1, np.int32)  # -1: none
        self.versions = np.zeros(pages, np.int64)
        self.tokens = np.zeros(pages, np.int32)  # of each page, from its first on

    @property
    def held(self) -> int:
        """Tokens of context."""
        return int(self.tokens[self.pages >= 0].sum())

    def take(self, other: RowContent, position: int) -> None:
        """The first `position` tokens are now copies of the other row's, and nothing follows."""
        tokens = page_tokens(position, self._size)
        count = len(tokens)
        self.pages[:count], self.versions[:count] = other.pages[:count], other.versions[:count]
        self.tokens[:count] = np.minimum(other.tokens[:count], tokens)
        self.pages[count:] = -1

    def stale(self, position: int, pages: Int32Array, versions: Versions) -> npt.NDArray[np.bool_]:
        """Of each page of a context of `position` tokens: whether it has to be copied; a short row lacks the last."""
        tokens = page_tokens(position, self._size)
        count = len(tokens)
        held, chosen = min(count, len(self.pages)), pages[:count]
        stale = np.ones(count, np.bool_)
        stale[:held] = self.pages[:held] != chosen[:held]
        stale[:held] |= self.versions[:held] != versions[chosen[:held]]
        stale[:held] |= self.tokens[:held] < tokens[:held]
        return stale


def page_tokens(position: int, size: int) -> npt.NDArray[np.int64]:
    """Tokens that the first `position` have in each of their pages."""
    return np.minimum(size, position - size * np.arange(-(-position // size)))


def page_spans(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    """Cut positions [start, stop) at page borders."""
    while start < stop:
        end = min(stop, start - start % size + size)
        yield start, end
        start = end
