"""Canvases committed beside others' steps on TensorRT's graph: against the oracle, and against calls one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from dgemma_build.emulation import EmulatedProbe, build_emulated, open_emulated
from dgemma_build.gate import GateReport, check_generation
from dgemma_build.oracle import Model, trace_generation
from dgemma_runtime.contract import (
    CommitRow,
    DenoiseResult,
    DenoiseRow,
    EncodeRow,
    EngineLimits,
    Float32Array,
    Int32Array,
    SequencePages,
)
from dgemma_runtime.engines.tensorrt import TensorRtEngine
from dgemma_runtime.noise import CanvasNoise

Named = Callable[[str], Path]
NAMES = ("odd_a", "odd_b", "demo")


@pytest.fixture(scope="module")
def built(checkpoint: Named, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Emulated engine directories in float32, each built once."""
    folder, made = tmp_path_factory.mktemp("emulated"), dict[str, Path]()

    def build(name: str) -> Path:
        if name not in made:
            made[name] = build_emulated(checkpoint(name), folder / name, "fp32", "fp32")
        return made[name]

    return build


class CommittingProbe(EmulatedProbe):
    """Commits what follows a canvas while the neighbours, which share its first pages, take one more step."""

    def __init__(self, directory: Path, max_tokens: int) -> None:
        super().__init__(directory, max_tokens, neighbours=2, threads=1)
        self.commits = 0
        self._rows: list[DenoiseRow] = []  # of the last step
        engine, denoise = self.engine, self.engine.denoise

        def watched(rows: Sequence[DenoiseRow], commits: Sequence[CommitRow] = ()) -> DenoiseResult:
            self._rows = list(rows)
            return denoise(rows, commits)

        engine.denoise = watched  # type: ignore[method-assign]

    def start(self) -> None:
        super().start()
        self._rows = []

    def encode(self, token_ids: Int32Array) -> None:
        if not self._rows:
            super().encode(token_ids)
            return
        *others, ended = self._rows
        assert ended.position == self._position
        commit = CommitRow(ended.slot, token_ids, ended.position, self._pages)
        self.engine.denoise([replace(row, first_step=False) for row in others], [commit])
        self._position += len(token_ids)
        self._rows = []
        self.commits += 1


@pytest.mark.parametrize("name", NAMES)
def test_in_float32_every_step_agrees_with_the_oracle(
    name: str, oracle: Callable[[str], Model], built: Callable[[str], Path]
) -> None:
    model = oracle(name)
    text, canvas = model.config.text_config, model.config.canvas_length
    window, report = min(text.sliding_window, 64), GateReport()
    probe = CommittingProbe(built(name), max_tokens=4 * window + 4 * canvas)
    for seed, length in enumerate((1, window, 3 * window + 2)):
        prompt = np.random.default_rng(seed).integers(0, text.vocab_size, length)
        options = {"max_new_tokens": 3 * canvas, "eos_token_id": None, "max_denoising_steps": 6}
        trace = trace_generation(model, prompt.tolist(), seed, CanvasNoise, **options)
        report.add(check_generation(trace, probe, encode_chunk=max(canvas, 7)))
    assert report.passed, report.failures[:3]
    assert probe.commits == 6


@dataclass
class Canvases:
    """A sequence whose canvases each take so many steps; ids and uniforms are drawn, not the model's."""

    slot: int
    steps: int
    pages: SequencePages
    length: int
    random: np.random.Generator
    step: int = 0
    found: list[Float32Array] = field(default_factory=list)  # entropies, step by step

    @property
    def over(self) -> bool:
        return self.step == self.steps

    def row(self, engine: TensorRtEngine) -> DenoiseRow:
        size, vocab = engine.spec.canvas_length, engine.spec.vocab_size
        ids, uniforms = self.random.integers(vocab, size=size, dtype=np.int32), self.random.random(size, np.float32)
        return DenoiseRow(self.slot, ids, uniforms, 0.7, self.length, self.pages, self.step == 0)

    def commit(self, engine: TensorRtEngine) -> CommitRow:
        ids = self.random.integers(engine.spec.vocab_size, size=engine.spec.canvas_length, dtype=np.int32)
        return CommitRow(self.slot, ids, self.length, self.pages)


def entropies(directory: Path, beside: bool) -> list[Float32Array]:
    """Of every step of three sequences; commits in the others' calls, or in calls of their own."""
    page, pages, ticks = 16, 40, 16
    engine = open_emulated(directory, EngineLimits(3, 64, page, 3 * pages, 3 * pages), threads=1)
    order = np.random.default_rng(9).permutation(3 * pages).astype(np.int32).reshape(3, pages)
    live = []
    for slot, (length, steps) in enumerate(((5, 2), (3 * page, 3), (70, 4))):
        one = Canvases(slot, steps, SequencePages(order[slot], order[slot]), length, np.random.default_rng(slot))
        for start in range(0, length, 48):
            ids = one.random.integers(engine.spec.vocab_size, size=min(48, length - start), dtype=np.int32)
            engine.encode([EncodeRow(ids, start, one.pages)])
        live.append(one)
    for _ in range(ticks):
        ended, stepping = [one for one in live if one.over], [one for one in live if not one.over]
        commits, rows = [one.commit(engine) for one in ended], [one.row(engine) for one in stepping]
        if not beside:
            for commit in commits:
                engine.release(commit.slot)
                engine.encode([EncodeRow(commit.token_ids, commit.position, commit.pages)])
        result = engine.denoise(rows, commits if beside else ())
        for one, found in zip(stepping, result.entropies, strict=True):
            one.found.append(found)
            one.step += 1
        for one in ended:
            one.step, one.length = 0, one.length + engine.spec.canvas_length
    engine.close()
    return [found for one in live for found in one.found]


@pytest.mark.parametrize("name", NAMES)
def test_beside_others_or_in_calls_of_their_own(name: str, built: Callable[[str], Path]) -> None:
    beside, apart = (entropies(built(name), way) for way in (True, False))
    assert len(beside) == len(apart) > 30
    assert max(float(np.abs(one - other).max()) for one, other in zip(beside, apart, strict=True)) < 1e-4
