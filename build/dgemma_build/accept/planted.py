"""Right answers with fluent errors planted in them: digits changed, names swapped. Knows no service."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from dgemma_build.demo.records import CITIES, COLORS, FRUITS, ITEMS, JOBS, NAMES
from dgemma_runtime.codec import Codec
from dgemma_runtime.contract import Int32Array

_WORDS = (NAMES, CITIES, COLORS, ITEMS, FRUITS, JOBS, ["true", "false"])
_MOST = (1, 2, 4)  # errors in an answer


@dataclass(frozen=True)
class Planted:
    """One draft."""

    truth: Int32Array  # [n]
    draft: Int32Array  # [n + 1], with the errors, and the end token
    places: tuple[int, ...]  # where they are

    def right(self, output: Int32Array) -> int:
        """At how many of the places the output [m] has the right token."""
        return sum(place < len(output) and bool(output[place] == self.truth[place]) for place in self.places)


class Planter:
    """Of one checkpoint. A token is replaced by another of its kind; by another of the answer where it has none."""

    def __init__(self, codec: Codec, end_id: int, seed: int = 0) -> None:
        self._codec, self._end_id, self._rng = codec, end_id, random.Random(seed)
        self._kinds: dict[int, list[int]] = {}
        for words in _WORDS:
            single = [ids[0] for ids in map(self._ids, words) if len(ids) == 1]
            self._kinds |= dict.fromkeys(single, single)

    def plant(self, answer: str, digits: str) -> Planted:
        """Errors in one right answer; `digits` are those that may stand in it."""
        truth = self._ids(answer)
        kinds = self._kinds | dict.fromkeys(alike := [self._ids(digit)[0] for digit in digits], alike)
        candidates = [place for place, token in enumerate(truth) if token in kinds] or list(range(len(truth)))
        chosen = self._rng.sample(candidates, min(len(candidates), self._rng.choice(_MOST)))
        ids, places = truth.copy(), []
        for place in sorted(chosen):
            if others := [token for token in kinds.get(truth[place], truth) if token != truth[place]]:
                ids[place] = self._rng.choice(others)
                places.append(place)
        draft = np.array([*ids, self._end_id], np.int32)
        return Planted(np.array(truth, np.int32), draft, tuple(places))

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._codec.encode(text).tolist()
        return ids[1:]  # without <bos>
