"""The plan of the TensorRT engine: against what an opened one allocates, and the scratch that the builder reports."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dgemma_build.attention import SLOT_GROUP
from dgemma_build.checkpoint import Checkpoint
from dgemma_build.emulation import OnnxFunction, build_emulated
from dgemma_build.engine import BuildRequest, build_engine
from dgemma_build.plan.options import PlanOptions
from dgemma_build.plan.released import model_config
from dgemma_build.plan.runtime_memory import runtime_memory
from dgemma_build.plan.scratch import scratch_bytes
from dgemma_build.random_checkpoint import config_dict, write_checkpoint
from dgemma_build.random_shapes import SHAPES, resized
from dgemma_build.tensorrt import longest_chunk
from dgemma_build.text_config import parse_config
from dgemma_runtime.contract import DenoiseRow, EncodeRow, Manifest, SequencePages
from dgemma_runtime.engines.bindings import Bindings
from dgemma_runtime.engines.host_device import HostDevice, HostProgram
from dgemma_runtime.engines.tensorrt import TensorRtEngine
from dgemma_runtime.errors import ConfigurationError
from dgemma_runtime.pages import PagePool, PageRules, PageTable
from dgemma_runtime.settings import RuntimeSettings, plan_limits

DEMO = Path(__file__).parents[2] / "build" / "checkpoints" / "demo"
SCRATCH_BAR = 0.15


@pytest.fixture(scope="module", params=[("odd_a", "bf16"), ("odd_a", "fp8"), ("odd_b", "bf16"), ("odd_b", "fp8")])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An emulated engine directory of a small checkpoint."""
    name, kv = request.param
    folder = tmp_path_factory.mktemp("plan")
    return build_emulated(write_checkpoint(folder / name, name), folder / "engine", "bf16", kv)


def limited(directory: Path, context: int, batch: int) -> Manifest:
    """As if it had been built for that many tokens and canvases."""
    manifest = Manifest.load(directory, verify_hashes=False)
    longest = longest_chunk(manifest.model.canvas_length)
    manifest = replace(
        manifest, max_model_len=context, max_batch_size=batch, max_encode_tokens=longest, backend="tensorrt"
    )
    manifest.save(directory)
    return manifest


def settings(batch: int) -> RuntimeSettings:
    return RuntimeSettings(max_batch_size=batch, prefix_cache=False)


@pytest.mark.parametrize(("context", "batch"), [(130, 1), (300, 3), (1024, 2), (1500, 4)])
def test_an_engine_full_of_canvases_takes_what_is_planned(built: Path, context: int, batch: int) -> None:
    """To the byte; and no more than that needs to be there."""
    manifest = limited(built, context, batch)
    options = PlanOptions("bf16", kv_precision=manifest.kv_dtype)
    planned = runtime_memory(manifest.model, options, batch, context)
    device, load = OnnxFunction(built, threads=1).on_host()
    device.memory_bytes = planned.total
    engine = TensorRtEngine(built, plan_limits(manifest, settings(batch)), device, load)
    tables = _fill(engine, context, batch)
    length = manifest.model.canvas_length
    ids, uniforms = np.zeros(length, np.int32), np.zeros(length, np.float32)
    rows = [DenoiseRow(slot, ids, uniforms, 1.0, context, pages, True) for slot, pages in enumerate(tables)]
    engine.denoise(rows)
    assert device.allocated_bytes == planned.total - planned.opening
    engine.denoise([replace(row, first_step=False) for row in rows])
    assert device.allocated_bytes == planned.total - planned.opening
    engine.close()


def _fill(engine: TensorRtEngine, context: int, batch: int) -> list[SequencePages]:
    """Encode `context` tokens of every sequence, the last of them alone."""
    limits = engine.limits
    rules = PageRules.of(limits, engine.spec.sliding_window)
    full, sliding = PagePool(limits.full_pages), PagePool(limits.sliding_pages)
    tables = [PageTable(full, sliding, rules, rules.need(context)) for _ in range(batch)]
    for table in tables:
        starts = [*range(0, context - 1, limits.max_encode_tokens), context - 1]
        for start, stop in zip(starts, [*starts[1:], context], strict=True):
            table.extend(stop)
            engine.encode([EncodeRow(np.zeros(stop - start, np.int32), start, table.view)])
            table.trim(stop)
    return [table.view for table in tables]


@pytest.mark.parametrize("kv", ["bf16", "fp8"])
@pytest.mark.parametrize("context", [8192, 262_144])
def test_the_released_model_opens_in_what_is_planned_and_in_no_less(
    odd_checkpoint: Path, tmp_path: Path, kv: str, context: int
) -> None:
    """Its bindings over a program that does nothing; memory that is not written to is not there."""
    directory = build_emulated(odd_checkpoint, tmp_path / "engine", "bf16", kv)
    spec = model_config(None)[1].spec
    manifest = replace(limited(directory, context, 1), model=spec)
    manifest.save(directory)
    limits = plan_limits(manifest, settings(1))
    slots = -(-context // SLOT_GROUP) * SLOT_GROUP
    specs = Bindings(spec, kv, "bf16", SLOT_GROUP, slots, 1, longest_chunk(spec.canvas_length)).specs()
    planned = runtime_memory(spec, PlanOptions("bf16", kv_precision=kv), 1, context)
    assert planned.opening > 0

    def opened(memory_bytes: int) -> TensorRtEngine:
        device = HostDevice(memory_bytes)
        return TensorRtEngine(directory, limits, device, lambda path: HostProgram(device, specs, lambda *_: None))

    opened(planned.total).close()
    with pytest.raises(ConfigurationError, match="too little memory"):
        opened(planned.total - 1)


# ---------------------------------------------------------------- scratch

# TensorRT for RTX 1.7.1: "Total Activation Memory" of one full layer of the released dimensions, whole vocabulary.
# Precision, precision of keys and values, canvases, context, bytes.
RECORDED = [
    ("bf16", "bf16", 1, 8192, 546_742_784),
    ("bf16", "bf16", 1, 262_144, 949_887_488),
    ("int4", "bf16", 1, 8192, 545_956_352),
    ("int4", "bf16", 1, 262_144, 949_101_056),
    ("fp8", "fp8", 1, 262_144, 1_216_815_616),
    ("fp8", "bf16", 4, 262_144, 3_792_720_384),
]
# The same of the demo checkpoint with one canvas and its whole context.
RECORDED_DEMO = {"fp32": 548_971_008, "bf16": 413_422_080, "fp8": 413_188_608, "int4": 413_516_288}


@pytest.mark.parametrize(("precision", "kv", "canvases", "context", "recorded"), RECORDED)
def test_scratch_is_what_tensorrt_rtx_1_7_1_reported_for_released_dimensions(
    precision: str, kv: str, canvases: int, context: int, recorded: int
) -> None:
    shape = resized(SHAPES["real"], layers=1)
    config = parse_config(config_dict(shape), Path("config.json"))
    planned = scratch_bytes(config, PlanOptions(precision, kv_precision=kv), canvases, context)
    assert planned.total == pytest.approx(recorded, rel=SCRATCH_BAR)


@pytest.mark.parametrize("precision", RECORDED_DEMO)
def test_scratch_is_what_tensorrt_rtx_1_7_1_reported_for_the_demo_checkpoint(precision: str) -> None:
    planned = scratch_bytes(Checkpoint(DEMO).config, PlanOptions(precision), 1, 262_144)
    assert planned.total == pytest.approx(RECORDED_DEMO[precision], rel=SCRATCH_BAR)


def test_scratch_is_what_the_installed_builder_reports(tmp_path: Path) -> None:
    manifest = build_engine(BuildRequest(DEMO, tmp_path / "engine", "tensorrt_rtx", "bf16", max_batch_size=1))
    planned = scratch_bytes(Checkpoint(DEMO).config, PlanOptions("bf16"), 1, manifest.max_model_len)
    assert planned.total == pytest.approx(manifest.scratch_bytes, rel=SCRATCH_BAR)
