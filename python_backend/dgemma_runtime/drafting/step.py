"""One denoising step of several canvases, where the first step of some takes two rows. Knows engine and slots.

The second row of such a canvas runs in the same call, in a slot that is free for the moment; where none is free, or
its context has no room a second time, it runs in its own slot in a call before. What the canvas keeps, its soft
embedding, is the first row's either way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy.typing as npt

from dgemma_runtime.canvas import Canvas
from dgemma_runtime.contract import CommitRow, DenoiseResult, DenoiseRow, Engine, SequencePages
from dgemma_runtime.requests import LiveRequest


class Slots(Protocol):
    """Of the scheduler: slots that no request has."""

    def lend_slot(self, tokens: int) -> int | None:
        """For a context of so many tokens; None where there is none to spare."""
        ...

    def give_back(self, slot: int) -> None: ...


def denoise_step(
    engine: Engine, requests: Sequence[LiveRequest], commits: Sequence[CommitRow], slots: Slots
) -> DenoiseResult:
    """A row of results per request, whose canvases have started. Raises EngineError, as engines do."""
    rows = [_canvas(request).row(*_place(request)) for request in requests]
    twice = [index for index, request in enumerate(requests) if _canvas(request).step == 0 and _canvas(request).halves]
    if not twice:
        return engine.denoise(rows, commits)
    beside, before = _second_rows(requests, twice, slots)
    try:
        earlier = engine.denoise(list(before.values())) if before else None
        try:
            result = engine.denoise([*rows, *beside.values()], commits)
        finally:
            for row in beside.values():
                engine.release(row.slot)
    finally:
        for row in beside.values():
            slots.give_back(row.slot)
    second = {index: (result, len(rows) + place) for place, index in enumerate(beside)}
    if earlier is not None:
        second |= {index: (earlier, place) for place, index in enumerate(before)}
    joined = DenoiseResult(*(array[: len(rows)].copy() for array in _arrays(result)))
    for index, (source, place) in second.items():
        for array, odd in zip(_arrays(joined), _arrays(source), strict=True):
            array[index, 1::2] = odd[place, 1::2]
    return joined


def _arrays(result: DenoiseResult) -> tuple[npt.NDArray[Any], ...]:
    return result.argmax_ids, result.sampled_ids, result.entropies


def _second_rows(
    requests: Sequence[LiveRequest], twice: Sequence[int], slots: Slots
) -> tuple[dict[int, DenoiseRow], dict[int, DenoiseRow]]:
    """By the request's index: what runs beside the first rows in a lent slot, and what runs before them."""
    beside: dict[int, DenoiseRow] = {}
    before: dict[int, DenoiseRow] = {}
    for index in twice:
        request = requests[index]
        slot = slots.lend_slot(request.cached_tokens)
        rows, place = (before, request.slot) if slot is None else (beside, slot)
        rows[index] = _canvas(request).second_row(place, *_place(request)[1:])
    return beside, before


def _canvas(request: LiveRequest) -> Canvas:
    assert request.canvas is not None
    return request.canvas


def _place(request: LiveRequest) -> tuple[int, int, SequencePages]:
    return request.slot, request.cached_tokens, request.page_view
