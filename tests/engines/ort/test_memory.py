"""The ONNX Runtime engine where memory is short: calls that fail and leave it usable, rows that are given back."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from dgemma_runtime.engines import ort_rows
from dgemma_runtime.engines.ort_rows import slots_for
from dgemma_runtime.errors import EngineError, EngineMemoryError

if TYPE_CHECKING:
    from tests.engines.ort.conftest import Make, Play


@pytest.mark.parametrize("failing", range(0, 37, 3))
def test_a_call_without_memory_leaves_the_engine_usable(
    play: Play, make: Make, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """The library fails in its n-th call: slots of the call are released, canvases start again, no more is lost."""
    engine, other = make(), make()
    cast, untroubled = play.stories(engine), play.stories(other)
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
    failed = play.persistent(engine, cast)
    play.together(other, untroubled)
    assert failed == 1
    play.assert_same(cast, untroubled)


@pytest.mark.parametrize("failing", range(4))
def test_rows_that_cannot_be_allocated(play: Play, make: Make, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    """numpy has no memory for a row of caches, not even after what was kept for later is given up."""
    engine, other = make(), make()
    cast, untroubled = play.stories(engine), play.stories(other)
    made = iter(range(10**6))
    initial = ort_rows.Rows.__init__

    def limited(self: ort_rows.Rows, *arguments: object, **named: object) -> None:
        if next(made) // 2 == failing:  # the second try too
            raise MemoryError("Unable to allocate")
        initial(self, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(ort_rows.Rows, "__init__", limited)
    failed = play.persistent(engine, cast)
    play.together(other, untroubled)
    assert failed == 1
    play.assert_same(cast, untroubled)


def test_another_failure_is_the_engines_end(play: Play, make: Make) -> None:
    engine = make()
    real = engine._session

    class Broken:
        def __getattr__(self, name: str) -> object:
            return getattr(real, name)

        def run_with_iobinding(self, binding: object) -> None:
            raise RuntimeError("invalid expand shape")

    engine._session = Broken()
    with pytest.raises(EngineError, match="invalid expand shape") as raised:
        play.Story(0, 5, (1,), engine).prefill()
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


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_a_long_context_leaves_no_memory_behind(play: Play, make: Make) -> None:
    """While another canvas stays in the workspace; and the canvas that comes next sees only its own context."""
    engine, other = make("demo", 64), make("demo", 64)
    stay, go, come = (play.Story(number, 5000, (9, 9), engine) for number in range(3))
    for story in (stay, go):
        story.prefill()
        engine.denoise([story.row()])
    row_bytes = slots_for(5000) * 6 * 64 * 4
    before = resident_bytes()
    engine.release(go.number)
    assert before - resident_bytes() > 0.5 * row_bytes
    alone = play.Story(2, 5000, (9, 9), other)
    for story in (come, alone):
        story.prefill()
    got, wanted = engine.denoise([stay.row(), come.row()]), other.denoise([alone.row()])
    np.testing.assert_array_equal(got.argmax_ids[1], wanted.argmax_ids[0])
    np.testing.assert_allclose(got.entropies[1], wanted.entropies[0], atol=1e-4)
