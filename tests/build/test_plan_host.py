"""The plan of the onnxruntime engine against a running one: weights, pages and peak memory of its process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dgemma_build.checkpoint import Checkpoint
from dgemma_build.engine import BuildRequest, build_engine
from dgemma_build.plan.host import cache_slots, host_memory
from dgemma_runtime.contract import Manifest
from dgemma_runtime.engines import onnxruntime as engine_module
from dgemma_runtime.errors import ConfigurationError
from dgemma_runtime.settings import RuntimeSettings, page_bytes, plan_limits

DEMO = Path(__file__).parents[2] / "build" / "checkpoints" / "demo"

# Serves `batch` sequences up to the whole context: prefill of two at a time, a canvas each, two steps, the commit.
WORKER = """
import json, sys
from pathlib import Path

import numpy as np

from dgemma_runtime.contract import DenoiseRow, EncodeRow, SequencePages
from dgemma_runtime.engines.factory import open_engine
from dgemma_runtime.settings import RuntimeSettings

directory, context, batch = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
engine = open_engine(directory, RuntimeSettings(max_model_len=context, max_batch_size=batch, threads=2))
canvas, size = engine.manifest.model.canvas_length, engine.limits.page_size
window = engine.limits.sliding_pages // batch
tables = []
for row in range(batch):
    count = engine.limits.full_pages // batch
    pages = np.arange(row * count, (row + 1) * count, dtype=np.int32)
    around = row * window + np.arange(count, dtype=np.int32) % window
    tables.append(SequencePages(pages, around))
position, ids = 0, np.arange(512, dtype=np.int32)
while position < context - canvas:
    length = min(512, context - canvas - position)
    for first in range(0, batch, 2):
        engine.encode([EncodeRow(ids[:length], position, table) for table in tables[first : first + 2]])
    position += length
uniforms = np.full(canvas, 0.5, np.float32)
for step in range(2):
    rows = [
        DenoiseRow(slot, ids[:canvas], uniforms, 0.8, position, table, step == 0) for slot, table in enumerate(tables)
    ]
    engine.denoise(rows)
engine.encode([EncodeRow(ids[:canvas], position, table) for table in tables])
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps(1024 * int(peak.split()[1])))
"""


@pytest.fixture(scope="module")
def demo_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("engines") / "demo"
    build_engine(BuildRequest(DEMO, output))
    return output


@pytest.mark.parametrize(("context", "batch"), [(1024, 1), (2048, 4), (6000, 2)])
def test_peak_memory_of_a_running_engine_is_within_a_tenth(demo_engine: Path, context: int, batch: int) -> None:
    arguments = [sys.executable, "-c", WORKER, str(demo_engine), str(context), str(batch)]
    done = subprocess.run(arguments, check=True, capture_output=True, text=True)
    planned = host_memory(Checkpoint(DEMO).config, "fp32", batch, context).peak
    assert json.loads(done.stdout) == pytest.approx(planned, rel=0.1)


@pytest.mark.parametrize(("context", "batch"), [(130, 1), (4096, 4), (100_000, 2)])
def test_pages_are_those_that_the_runtime_reserves(demo_engine: Path, context: int, batch: int) -> None:
    manifest = Manifest.load(demo_engine)
    limits = plan_limits(manifest, RuntimeSettings(max_model_len=context, max_batch_size=batch))
    pages = page_bytes(manifest, limits.page_size)
    reserved = limits.full_pages * pages.full + limits.sliding_pages * pages.sliding
    assert host_memory(Checkpoint(DEMO).config, "fp32", batch, context).kv_pools == reserved


def test_workspaces_are_rounded_as_the_engine_rounds_them() -> None:
    for tokens in (1, 127, 128, 129, 4095, 4096, 4097, 100_000):
        assert cache_slots(tokens) == engine_module._slots_for(tokens)


def test_integer_weights_take_less_and_nothing_else_changes() -> None:
    config = Checkpoint(DEMO).config
    wide, narrow = (host_memory(config, precision, 2, 2048) for precision in ("fp32", "int4"))
    assert narrow.weights < wide.weights / 2
    assert narrow.peak - narrow.weights == wide.peak - wide.weights


def test_a_precision_that_the_engine_lacks_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="--precision fp8: onnxruntime is built in"):
        host_memory(Checkpoint(DEMO).config, "fp8", 1, 1024)
