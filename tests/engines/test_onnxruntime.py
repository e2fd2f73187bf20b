"""The ONNX Runtime engine: commits beside steps, contexts kept from call to call, and calls without memory."""

from __future__ import annotations

import resource
import subprocess
import sys
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
from dgemma_runtime.engines import ort_pages, ort_rows
from dgemma_runtime.engines.onnxruntime import OnnxRuntimeEngine
from dgemma_runtime.engines.ort_rows import encode_tokens, slots_for
from dgemma_runtime.errors import EngineError, EngineMemoryError

DEMO = Path(__file__).resolve().parents[2] / "build/checkpoints/demo"
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


@pytest.mark.parametrize(("name", "page_size"), [("demo", 64), ("odd_a", 16), ("odd_a", 7), ("odd_b", 16)])
def test_commits_beside_steps_are_separate_calls(make: Make, name: str, page_size: int) -> None:
    engines = [make(name, page_size) for _ in range(2)]
    casts = [stories(engine) for engine in engines]
    together(engines[0], casts[0])
    apart(engines[1], casts[1])
    assert_same(*casts)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens read from pages, of each head of each full layer's keys and values of the demo checkpoint."""
    read: list[int] = []
    gather = ort_pages._gather

    def counted(pool: Float32Array, pages: Int32Array, target: Float32Array) -> None:
        if target.shape[1]:
            read.append(target.shape[1])
        gather(pool, pages, target)

    monkeypatch.setattr(ort_pages, "_gather", counted)
    return read


TENSORS = 6  # keys and values of three full layers


def test_a_context_is_laid_out_once(make: Make, reads: list[int]) -> None:
    """Nothing is read between chunks and between canvases, but where a row grew: at 128, 256, 512, 1024 tokens."""
    engine = make("demo", 64)
    story = Story(0, 1100, (2, 2, 2, 2), engine)
    story.prefill()
    assert reads == TENSORS * [128] + TENSORS * [256] + TENSORS * [512] + TENSORS * [1024]
    reads.clear()
    while not story.over:
        if story.ended:
            engine.denoise([], [story.commit()])
            story.committed()
        else:
            story.stepped(engine.denoise([story.row()]), 0)
    assert reads == TENSORS * [1100]


def test_a_restarted_canvas_finds_its_context(make: Make, reads: list[int]) -> None:
    engine = make("demo", 64)
    story = Story(0, 150, (9,), engine)
    story.prefill()
    engine.denoise([story.row()])
    reads.clear()
    engine.release(0)
    engine.denoise([story.row()])
    assert reads == []


def test_prompts_in_turns_find_their_contexts(make: Make, reads: list[int]) -> None:
    """One shares its first pages with another, which goes on."""
    engine = make("demo", 16)
    first, second = Story(0, 320, (1,), engine), Story(1, 320, (1,), engine)
    shared = np.concatenate([first.pages.full[:8], second.pages.full[8:]])
    second.pages = SequencePages(shared, np.concatenate([first.pages.sliding[:8], second.pages.sliding[8:]]))
    prompt = first.ids(0, 320)
    for start in range(0, 128, 64):
        engine.encode([EncodeRow(prompt[start : start + 64], start, first.pages)])
    for start in range(128, 256, 64):
        engine.encode([EncodeRow(prompt[start : start + 64], start, story.pages) for story in (first, second)])
    assert reads == 2 * TENSORS * [128], "rows of 256 slots, one for each"


def test_pages_that_another_sequence_has_written_are_read_again(make: Make) -> None:
    """A new sequence gets an old one's pages, at the same positions, while the old one's rows are still there."""
    engine, other = make(), make()
    old, new, fresh = Story(0, 110, (2, 2), engine), Story(1, 110, (2, 2), engine), Story(1, 110, (2, 2), other)
    new.pages = old.pages
    together(engine, [old])
    together(engine, [new])
    together(other, [fresh])
    assert_same([new], [fresh])


def test_canvases_that_do_not_take_part_keep_their_state(make: Make) -> None:
    """Calls for some of the slots only, as after a request was dropped."""
    engine, other = make("odd_b"), make("odd_b")
    cast, alone = stories(engine), stories(other)
    for story in cast:
        story.prefill()
    while any(not story.over for story in cast):
        for story in reversed([each for each in cast if not each.over]):
            if story.ended:
                engine.denoise([], [story.commit()])
                story.committed()
            else:
                story.stepped(engine.denoise([story.row()]), 0)
    apart(other, alone)
    assert_same(cast, alone)


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("failing", range(0, 37, 3))
def test_a_call_without_memory_leaves_the_engine_usable(
    make: Make, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """The library fails in its n-th call: slots of the call are released, canvases start again, no more is lost."""
    engine, other = make(), make()
    cast, untroubled = stories(engine), stories(other)
    calls = iter(range(10**6))
    real = engine._session

    class Session:
        def __getattr__(self, name: str) -> object:
            return getattr(real, name)

        def run_with_iobinding(self, binding: object) -> None:
            if next(calls) == failing:
                raise RuntimeError("[ONNXRuntimeError] : Failed to allocate memory for requested buffer of size 1")
            real.run_with_iobinding(binding)

    engine._session = Session()
    failed = persistent(engine, cast)
    together(other, untroubled)
    assert failed == 1
    assert_same(cast, untroubled)


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


@pytest.mark.parametrize("failing", range(4))
def test_rows_that_cannot_be_allocated(make: Make, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    """numpy has no memory for a row of caches, not even after what was kept for later is given up."""
    engine, other = make(), make()
    cast, untroubled = stories(engine), stories(other)
    made = iter(range(10**6))
    initial = ort_rows.Rows.__init__

    def limited(self: ort_rows.Rows, *arguments: object, **named: object) -> None:
        if next(made) // 2 == failing:  # the second try too
            raise MemoryError("Unable to allocate")
        initial(self, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(ort_rows.Rows, "__init__", limited)
    failed = persistent(engine, cast)
    together(other, untroubled)
    assert failed == 1
    assert_same(cast, untroubled)


def test_another_failure_is_the_engines_end(make: Make) -> None:
    engine = make()
    real = engine._session

    class Broken:
        def __getattr__(self, name: str) -> object:
            return getattr(real, name)

        def run_with_iobinding(self, binding: object) -> None:
            raise RuntimeError("invalid expand shape")

    engine._session = Broken()
    with pytest.raises(EngineError, match="invalid expand shape") as raised:
        Story(0, 5, (1,), engine).prefill()
    assert not isinstance(raised.value, EngineMemoryError)


LIMITED = """
import resource, sys
from pathlib import Path
import numpy as np
from dgemma_runtime.contract import DenoiseRow, EncodeRow, EngineLimits, SequencePages
from dgemma_runtime.engines.onnxruntime import OnnxRuntimeEngine
from dgemma_runtime.errors import EngineMemoryError

engine = OnnxRuntimeEngine(Path(sys.argv[1]), EngineLimits(1, 512, 64, 2048, 2048), threads=1)
pages = SequencePages(*(np.arange(2048, dtype=np.int32) for _ in range(2)))
ids, uniforms = np.arange(64, dtype=np.int32), np.full(64, 0.5, np.float32)
row = DenoiseRow(0, ids, uniforms, 0.8, 64, pages, True)
engine.encode([EncodeRow(ids, 0, pages)])
before = engine.denoise([row])
engine.release(0)
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    engine.denoise([DenoiseRow(0, ids, uniforms, 0.8, 100_000, pages, True)])
except EngineMemoryError as error:
    print("no memory:", error)
engine.release(0)
after = engine.denoise([row])
print("same" if np.array_equal(before.argmax_ids, after.argmax_ids) else "different")
"""


@pytest.mark.parametrize("spare", [20_000_000, 220_000_000], ids=["numpy", "the library"])
def test_a_process_that_runs_out_of_memory_goes_on(ort_directory: Callable[[str], Path], spare: int) -> None:
    """A context of 100,000 tokens where the operating system gives no more: 157 MB laid out, more for the scores."""
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY
    command = [sys.executable, "-c", LIMITED, str(ort_directory("demo")), str(spare)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("no memory: there is no memory for this call"), done.stdout + done.stderr
    assert done.stdout.endswith("same\n")


# ---------------------------------------------------------------- sizes


def test_a_long_prompt_is_encoded_in_smaller_pieces(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [encode_tokens(tokens) for tokens in (1, 4096, 65_536, 131_072, 262_144)] == [262_144, 8192, 512, 256, 128]
    monkeypatch.setattr(ort_rows, "_MOST_SCORES", 64 * 128)
    small, whole = make("demo", 64, chunk=512), make("demo", 64, chunk=512)
    casts = [Story(0, 512, (2,), small)], [Story(0, 512, (2,), whole)]
    together(small, casts[0])
    assert {key[1] for encoder in small._encoders for key in encoder.bindings} == {64}
    monkeypatch.undo()
    together(whole, casts[1])
    assert {key[1] for encoder in whole._encoders for key in encoder.bindings} == {512}
    assert_same(*casts)


def test_rows_laid_out_are_no_more_than_slots(make: Make) -> None:
    """Prompts that came and went without a canvas do not pile up."""
    engine = make()
    cast = [Story(number, 40, (9, 9), engine) for number in range(4)]
    for story in cast[:3] * 2 + cast[3:]:
        story.prefill()
    assert len(engine._encoders) == 4
    for story in cast[:3]:
        engine.denoise([story.row()])
    for story in cast[3:] * 3:
        story.prefill()
    assert sum(workspace.occupied for workspace in engine._workspaces) == 3
    assert len(engine._encoders) == 1


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_a_long_context_leaves_no_memory_behind(make: Make) -> None:
    """While another canvas stays in the workspace; and the canvas that comes next sees only its own context."""
    engine, other = make("demo", 64), make("demo", 64)
    stay, go, come = (Story(number, 5000, (9, 9), engine) for number in range(3))
    for story in (stay, go):
        story.prefill()
        engine.denoise([story.row()])
    row_bytes = slots_for(5000) * 6 * 64 * 4
    before = resident_bytes()
    engine.release(go.number)
    assert before - resident_bytes() > 0.5 * row_bytes
    alone = Story(2, 5000, (9, 9), other)
    for story in (come, alone):
        story.prefill()
    got, wanted = engine.denoise([stay.row(), come.row()]), other.denoise([alone.row()])
    np.testing.assert_array_equal(got.argmax_ids[1], wanted.argmax_ids[0])
    np.testing.assert_allclose(got.entropies[1], wanted.entropies[0], atol=1e-4)
