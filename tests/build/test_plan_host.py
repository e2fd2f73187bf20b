"""The plan of the onnxruntime engine against a running one: weights, pages and peak memory of its process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dgemma_build.checkpoint import Checkpoint
from dgemma_build.engine import BuildRequest, build_engine
from dgemma_build.plan.host import PREFILL_CHUNK, planned_host_memory
from dgemma_runtime.contract import Manifest
from dgemma_runtime.errors import ConfigurationError
from dgemma_runtime.memory_formulas import (
    PAGE_SIZE,
    LayerWork,
    host_memory,
    limits_of,
    page_pool_bytes,
)
from dgemma_runtime.settings import RuntimeSettings, plan_limits

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
    planned = planned_host_memory(Checkpoint(DEMO).config, "fp32", batch, context).peak
    assert json.loads(done.stdout) == pytest.approx(planned, rel=0.1)


@pytest.mark.parametrize(("context", "batch"), [(130, 1), (4096, 4), (100_000, 2)])
def test_pages_are_those_that_the_runtime_reserves(demo_engine: Path, context: int, batch: int) -> None:
    manifest = Manifest.load(demo_engine)
    settings = RuntimeSettings(max_model_len=context, max_batch_size=batch, prefix_cache=False)
    assert (settings.page_size, settings.prefill_chunk) == (PAGE_SIZE, PREFILL_CHUNK)
    reserved = page_pool_bytes(manifest.model, manifest.kv_dtype, plan_limits(manifest, settings))
    assert planned_host_memory(Checkpoint(DEMO).config, "fp32", batch, context).kv_pools == reserved


def test_a_server_plans_what_the_exporter_planned(demo_engine: Path) -> None:
    """But for the small constants of the graph, which stand in its file."""
    manifest = Manifest.load(demo_engine)
    work = LayerWork(manifest.num_attention_heads, manifest.layer_values)
    limits = limits_of(manifest.model, 2, 4096, PREFILL_CHUNK)
    served = host_memory(manifest.model, work, (demo_engine / "model.onnx.data").stat().st_size, limits, 4096)
    planned = planned_host_memory(Checkpoint(DEMO).config, "fp32", 2, 4096)
    assert served.peak - served.weights == planned.peak - planned.weights
    assert served.weights == pytest.approx(planned.weights, rel=0.05)


def test_integer_weights_take_less_and_nothing_else_changes() -> None:
    config = Checkpoint(DEMO).config
    wide, narrow = (planned_host_memory(config, precision, 2, 2048) for precision in ("fp32", "int4"))
    assert narrow.weights < wide.weights / 2
    assert narrow.peak - narrow.weights == wide.peak - wide.weights


def test_a_precision_that_the_engine_lacks_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="--precision fp8: onnxruntime is built in"):
        planned_host_memory(Checkpoint(DEMO).config, "fp8", 1, 1024)
