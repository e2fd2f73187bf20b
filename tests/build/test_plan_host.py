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


@pytest.fixture(scope="module")
def demo_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("engines") / "demo"
    build_engine(BuildRequest(DEMO, output))
    return output


@pytest.mark.parametrize(("context", "batch"), [(1024, 1), (2048, 4), (6000, 2)])
def test_peak_memory_of_a_running_engine_is_within_a_tenth(demo_engine: Path, context: int, batch: int) -> None:
    arguments = [sys.executable, "-m", "dgemma_build.bench.peak_worker", str(demo_engine), str(context), str(batch)]
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
