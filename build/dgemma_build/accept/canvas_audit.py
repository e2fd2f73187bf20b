"""Holds every canvas of a service to the rule: what is committed is the denoiser's argmax, by the stopping rule.

Written from the rule, not from the code that it judges: it sees what engine calls returned, what a canvas started from
and what was committed, and knows no drafter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

import numpy as np

from dgemma_build.bench.inprocess import Outcome
from dgemma_runtime.canvas import Canvas
from dgemma_runtime.contract import (
    CommitRow,
    DenoiseResult,
    DenoiseRow,
    Float32Array,
    Int32Array,
    ModelSpec,
    SequencePages,
)
from dgemma_runtime.drafting.hole import HoleCanvas
from dgemma_runtime.drafting.proposal import Pins, Proposal
from dgemma_runtime.engines.onnxruntime import OnnxRuntimeEngine
from dgemma_runtime.noise import CanvasNoise
from dgemma_runtime.parameters import GenerationParameters
from dgemma_runtime.service import GenerationRequest

_CALLS = 2  # a first step in halves may take two
_Key = tuple[bytes, bytes, int]  # a row: canvas ids, uniforms, position


@dataclass
class CanvasRecord:
    """One canvas from its start; preempted ones never end."""

    parameters: GenerationParameters
    proposal: Proposal | None
    pins: Pins | None
    argmax: list[Int32Array] = field(default_factory=list)  # of each step, as the engine gave it
    entropies: list[Float32Array] = field(default_factory=list)
    rows: list[_Key] = field(default_factory=list)  # of the next step: one, or two
    place: tuple[int, int] = (-1, -1)  # slot and position
    committed: Int32Array | None = None  # [canvas_length], once it ended

    def fault(self) -> str | None:
        """What the rule forbids about how it ended."""
        assert self.committed is not None
        if not np.array_equal(self.with_pins(self.argmax[-1]), self.committed):
            return "the committed canvas is not the denoiser's argmax"
        steps, most = len(self.argmax), self.parameters.max_denoising_steps
        free = self.pins is None or not self.pins.pinned[: self.pins.read].all()
        if any(self._may_stop(step) for step in range(steps - 1)):
            return "it went on where the rule had ended it"
        if steps < most and free and not self._may_stop(steps - 1):
            return f"it ended after {steps} of {most} steps, neither stable nor sure"
        return None if steps <= most else f"it took {steps} of {most} steps"

    def _may_stop(self, step: int) -> bool:
        needed, below = self.parameters.stability_threshold, self.parameters.confidence_threshold
        if needed is None or below is None:
            return False
        canvases = [*self._credited(), *map(self.with_pins, self.argmax[: step + 1])]
        if len(canvases) <= needed:
            return False
        read = None if self.pins is None else self.pins.read
        stable = all(np.array_equal(canvases[-1][:read], other[:read]) for other in canvases[-1 - needed : -1])
        entropies = self.entropies[step][:read]
        if self.pins is not None:
            entropies = entropies[~self.pins.pinned[:read]]
        return stable and float(np.float32(entropies.astype(np.float64).mean())) < float(np.float32(below))

    def _credited(self) -> list[Int32Array]:
        """What counts as the argmax before the first step: the draft, up to the end of the output."""
        if self.proposal is None:
            return []
        draft = self.with_pins(self.proposal.token_ids)
        if self.pins is None:
            ends = np.flatnonzero(np.isin(self.argmax[0], self.parameters.end_ids))
            if len(ends):
                known = np.flatnonzero(draft >= 0)
                draft_ends_there = len(known) and ends[0] == known[-1] + 1
                behind = ends[0] if draft_ends_there else ends[0] + 1
                draft[behind:] = self.argmax[0][behind:]
        return [draft]

    def with_pins(self, ids: Int32Array) -> Int32Array:
        """`ids` [canvas_length] with the pinned ones in their places."""
        return ids.copy() if self.pins is None else np.where(self.pins.pinned, self.pins.token_ids, ids)


class Audit:
    """Of the services that were started while it was open."""

    def __init__(self) -> None:
        self._faults: list[str] = []
        self.ended: dict[bytes, CanvasRecord] = {}  # by the noise that the canvas would have started from
        self._by_place: dict[tuple[int, int], CanvasRecord] = {}
        self._calls: list[dict[_Key, DenoiseResult]] = []

    @property
    def faults(self) -> list[str]:
        """What broke the rule; an audit that saw no canvas end says nothing of the rule, which is a fault too."""
        return self._faults if self.ended else [*self._faults, "the audit saw no canvas"]

    def of(self, seed: int, canvas_index: int, model: ModelSpec) -> CanvasRecord:
        """The canvas of a request with a seed."""
        return self.ended[CanvasNoise(seed, canvas_index, model.canvas_length, model.vocab_size).initial().tobytes()]

    def check(self, requests: Sequence[GenerationRequest], outcomes: Sequence[Outcome], model: ModelSpec) -> None:
        """That clients received what was committed; faults are added."""
        for request, outcome in zip(requests, outcomes, strict=True):
            seed = request.parameters.seed
            assert seed is not None
            for _, commit in outcome.commits:
                record = self.of(seed, commit.canvas_index, model)
                assert record.committed is not None
                if not np.array_equal(record.committed[: len(commit.token_ids)], commit.token_ids):
                    self._faults.append(f"seed {seed}, canvas {commit.canvas_index}: emitted is not what was committed")
                if len(record.argmax) != commit.steps:
                    self._faults.append(f"seed {seed}, canvas {commit.canvas_index}: {commit.steps} steps reported")

    def called(self, rows: Sequence[DenoiseRow], commits: Sequence[CommitRow], result: DenoiseResult) -> None:
        """A pass of the engine."""
        arrays = (result.argmax_ids, result.sampled_ids, result.entropies)
        call = {_key(row): DenoiseResult(*(one[i].copy() for one in arrays)) for i, row in enumerate(rows)}
        self._calls = [*self._calls, call][-_CALLS:]
        for commit in commits:
            record = self._by_place.get((commit.slot, commit.position))
            ids = None if record is None else record.committed
            if ids is None or not np.array_equal(ids, commit.token_ids):
                self._faults.append(f"slot {commit.slot}, position {commit.position}: another canvas went to the cache")

    def shown(self, record: CanvasRecord, row: DenoiseRow) -> None:
        """The denoiser is about to see a canvas; its pins must be in it."""
        if not np.array_equal(record.with_pins(row.canvas_ids), row.canvas_ids):
            self._faults.append(f"slot and position {record.place}: the denoiser was shown something else than a pin")

    def advanced(self, record: CanvasRecord, given: DenoiseResult) -> None:
        """A canvas takes a step's results; they must be the engine's."""
        results = [call[row] for row in record.rows for call in self._calls if row in call]
        if len(results) != len(record.rows):
            self._faults.append(f"slot and position {record.place}: results of another pass")
            return
        arrays = (given.argmax_ids, given.sampled_ids, given.entropies)
        for place, one in enumerate(results):
            theirs = (one.argmax_ids, one.sampled_ids, one.entropies)
            share = slice(place, None, len(results))
            if not all(np.array_equal(a[share], b[share]) for a, b in zip(arrays, theirs, strict=True)):
                self._faults.append(f"slot and position {record.place}: results that no pass gave")

    def end(self, record: CanvasRecord, initial: Int32Array, committed: Int32Array) -> None:
        """A canvas is done."""
        record.committed = committed.copy()
        if fault := record.fault():
            self._faults.append(f"slot and position {record.place}: {fault}")
        self.ended[initial.tobytes()] = record
        self._by_place[record.place] = record


def _key(row: DenoiseRow) -> _Key:
    return row.canvas_ids.tobytes(), row.uniforms.tobytes(), row.position


@contextmanager
def audited() -> Iterator[Audit]:
    """Services of `inprocess` that start within are audited; one at a time."""
    audit = Audit()

    class Watched(Canvas):
        def __init__(
            self,
            parameters: GenerationParameters,
            noise: CanvasNoise,
            proposal: Proposal | None = None,
            pins: Pins | None = None,
        ) -> None:
            super().__init__(parameters, noise, proposal, pins)
            self._initial = noise.initial()
            self._record = CanvasRecord(parameters, proposal, pins)

        def row(self, slot: int, position: int, pages: SequencePages) -> DenoiseRow:
            row = super().row(slot, position, pages)
            self._record.rows, self._record.place = [_key(row)], (slot, position)
            audit.shown(self._record, row)
            return row

        def second_row(self, slot: int, position: int, pages: SequencePages) -> DenoiseRow:
            row = super().second_row(slot, position, pages)
            self._record.rows.append(_key(row))
            audit.shown(self._record, row)
            return row

        def advance(self, argmax_ids: Int32Array, sampled_ids: Int32Array, entropies: Float32Array) -> bool:
            audit.advanced(self._record, DenoiseResult(argmax_ids, sampled_ids, entropies))
            self._record.argmax.append(argmax_ids.copy())
            self._record.entropies.append(entropies.copy())
            done = super().advance(argmax_ids, sampled_ids, entropies)
            if done:
                audit.end(self._record, self._initial, self.argmax_ids)
            return done

    class WatchedHole(HoleCanvas, Watched):
        """Every length that the search looks at is begun as a canvas of its own; the last one ends it."""

    class Watching(OnnxRuntimeEngine):
        def denoise(self, rows: Sequence[DenoiseRow], commits: Sequence[CommitRow] = ()) -> DenoiseResult:
            result = super().denoise(rows, commits)
            audit.called(rows, commits, result)
            return result

    canvases = mock.patch.multiple("dgemma_runtime.requests", Canvas=Watched, HoleCanvas=WatchedHole)
    with canvases, mock.patch("dgemma_build.bench.inprocess.OnnxRuntimeEngine", Watching):
        yield audit
