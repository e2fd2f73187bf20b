"""The ONNX Runtime engine on small models, and sequences that are played on it in several ways."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from dgemma_build.engine import BuildRequest, build_engine
from dgemma_build.random_checkpoint import write_checkpoint
from dgemma_runtime.contract import (
    SLIDING,
    CommitRow,
    DenoiseResult,
    DenoiseRow,
    EncodeRow,
    EngineLimits,
    Float32Array,
    Int32Array,
    SequencePages,
)
from dgemma_runtime.engines.onnxruntime import OnnxRuntimeEngine
from dgemma_runtime.errors import EngineMemoryError

DEMO = Path(__file__).resolve().parents[3] / "build/checkpoints/demo"
PAGES = 96  # for each of four sequences

Make = Callable[..., OnnxRuntimeEngine]


@pytest.fixture(scope="session")
def ort_directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """An engine of the demo checkpoint or of a generated one."""

    @cache
    def directory(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        checkpoint = DEMO if name == "demo" else write_checkpoint(folder / "checkpoint", name)
        build_engine(BuildRequest(checkpoint, folder / "engine"))
        return folder / "engine"

    return directory


@pytest.fixture
def make(ort_directory: Callable[[str], Path]) -> Iterator[Make]:
    made: list[OnnxRuntimeEngine] = []

    def build(name: str = "odd_a", page_size: int = 16, chunk: int = 64) -> OnnxRuntimeEngine:
        limits = EngineLimits(4, chunk, page_size, 4 * PAGES, 4 * PAGES)
        made.append(OnnxRuntimeEngine(ort_directory(name), limits, threads=1))
        return made[-1]

    yield build
    for engine in made:
        engine.close()


@dataclass
class Story:
    """One sequence: what it sends depends on its number, its canvas and its step, not on when."""

    number: int
    prompt_tokens: int
    steps: tuple[int, ...]  # of each canvas
    engine: OnnxRuntimeEngine
    results: list[tuple[Int32Array, Int32Array, Float32Array]] = field(default_factory=list)
    position: int = 0
    canvas: int = 0
    step: int = 0

    def __post_init__(self) -> None:
        own = np.random.default_rng(1).permutation(4 * PAGES).astype(np.int32)[self.number :: 4]
        self.pages = SequencePages(own, own[::-1].copy())

    def ids(self, what: int, count: int) -> Int32Array:
        random = np.random.default_rng((self.number, self.canvas, self.step, what))
        return random.integers(0, self.engine.spec.vocab_size, count).astype(np.int32)

    def prefill(self) -> None:
        chunk = self.engine.limits.max_encode_tokens
        prompt = self.ids(0, self.prompt_tokens)
        for start in range(0, len(prompt), chunk):
            self.engine.encode([EncodeRow(prompt[start : start + chunk], start, self.pages)])
        self.position = len(prompt)

    @property
    def over(self) -> bool:
        return self.canvas == len(self.steps)

    @property
    def ended(self) -> bool:
        """The present canvas is to be committed."""
        return self.step == self.steps[self.canvas]

    def row(self) -> DenoiseRow:
        length = self.engine.spec.canvas_length
        uniforms = np.random.default_rng((self.number, self.canvas, self.step)).random(length, np.float32)
        first = self.step == 0
        return DenoiseRow(self.number, self.ids(1, length), uniforms, 0.7, self.position, self.pages, first)

    def commit(self) -> CommitRow:
        ids = self.ids(2, self.engine.spec.canvas_length)
        return CommitRow(self.number, ids, self.position, self.pages)

    def committed(self) -> None:
        self.position += self.engine.spec.canvas_length
        self.canvas, self.step = self.canvas + 1, 0

    def stepped(self, result: DenoiseResult, index: int) -> None:
        self.results.append((result.argmax_ids[index], result.sampled_ids[index], result.entropies[index]))
        self.step += 1


def stories(engine: OnnxRuntimeEngine) -> list[Story]:
    """Contexts that grow out of their workspaces, canvases that end at different times, one that leaves early."""
    return [
        Story(0, 70, (2, 3, 1, 2, 2), engine),
        Story(1, 90, (3, 2, 2), engine),
        Story(2, 1, (1, 1, 4, 1, 2, 1), engine),
        Story(3, 130, (4, 2, 3, 1), engine),
    ]


def together(engine: OnnxRuntimeEngine, cast: list[Story]) -> None:
    """Everybody in one call a tick, commits beside steps."""
    for story in cast:
        story.prefill()
    while any(not story.over for story in cast):
        live = [story for story in cast if not story.over]
        ended = [story for story in live if story.ended]
        stepping = [story for story in live if not story.ended]
        result = engine.denoise([story.row() for story in stepping], [story.commit() for story in ended])
        for index, story in enumerate(stepping):
            story.stepped(result, index)
        for story in ended:
            story.committed()
            if story.over:
                engine.release(story.number)


def apart(engine: OnnxRuntimeEngine, cast: list[Story]) -> None:
    """One call for each, commits as chunks of a prompt, nothing kept from canvas to canvas."""
    for story in cast:
        story.prefill()
        while not story.over:
            if story.ended:
                engine.release(story.number)
                commit = story.commit()
                engine.encode([EncodeRow(commit.token_ids, commit.position, commit.pages)])
                story.committed()
            else:
                story.stepped(engine.denoise([story.row()]), 0)
        engine.release(story.number)


def assert_same(one: list[Story], other: list[Story]) -> None:
    for mine, theirs in zip(one, other, strict=True):
        assert mine.position == theirs.position
        for got, wanted in zip(mine.results, theirs.results, strict=True):
            np.testing.assert_array_equal(got[0], wanted[0])
            np.testing.assert_array_equal(got[1], wanted[1])
            np.testing.assert_allclose(got[2], wanted[2], atol=1e-4)
        for layer, spec in enumerate(mine.engine.spec.layers):
            start = max(0, mine.position - mine.engine.spec.sliding_window) if spec.kind == SLIDING else 0
            found, expected = (
                story.engine.keys_values(layer, story.pages, start, story.position) for story in (mine, theirs)
            )
            np.testing.assert_allclose(found, expected, atol=1e-4)


def persistent(engine: OnnxRuntimeEngine, cast: list[Story]) -> int:
    """Like `together`, but starts again what was in a call that failed; how often that happened."""
    failed = 0
    for story in cast:
        try:
            story.prefill()
        except EngineMemoryError:
            failed += 1
            story.prefill()
    while any(not story.over for story in cast):
        live = [story for story in cast if not story.over]
        ended = [story for story in live if story.ended]
        stepping = [story for story in live if not story.ended]
        try:
            result = engine.denoise([story.row() for story in stepping], [story.commit() for story in ended])
        except EngineMemoryError:
            failed += 1
            for story in live:
                engine.release(story.number)
            for story in stepping:
                del story.results[len(story.results) - story.step :]
                story.step = 0
            continue
        for index, story in enumerate(stepping):
            story.stepped(result, index)
        for story in ended:
            story.committed()
    return failed


class Play:
    """All of it, for modules that cannot import this one."""

    Story = Story
    stories = staticmethod(stories)
    together = staticmethod(together)
    apart = staticmethod(apart)
    persistent = staticmethod(persistent)
    assert_same = staticmethod(assert_same)


@pytest.fixture
def play() -> Play:
    return Play()
