"""The drafter on TensorRT, emulated in ordinary memory: it drafts what ONNX Runtime's does, and steps are as before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.drafter.conftest import CANVAS, PAGE, Slots
from typer.testing import CliRunner

from dgemma_build.cli import app
from dgemma_build.demo.skills import SKILLS, held_out_set
from dgemma_build.demo.tokenizer import render_turn
from dgemma_build.drafter.export import DrafterRequest, build_drafter
from dgemma_build.emulation import EmulatedBackend, build_emulated, build_emulated_drafter, open_emulated
from dgemma_build.engine import BuildRequest, build_engine
from dgemma_runtime.codec import Codec
from dgemma_runtime.contract import (
    DenoiseResult,
    DraftRow,
    EncodeRow,
    EngineLimits,
    Manifest,
    SequencePages,
)
from dgemma_runtime.drafter_manifest import DrafterManifest
from dgemma_runtime.engines.device import OutOfMemory
from dgemma_runtime.engines.factory import open_engine
from dgemma_runtime.engines.host_device import HostDevice
from dgemma_runtime.engines.onnxruntime import OnnxRuntimeEngine
from dgemma_runtime.errors import ConfigurationError, EngineError, EngineMemoryError, ManifestError
from dgemma_runtime.host_memory import AvailableMemory
from dgemma_runtime.memory_plan import plan_device_memory
from dgemma_runtime.settings import RuntimeSettings

CHECKPOINTS = Path(__file__).resolve().parents[2] / "build/checkpoints"
LENGTHS = (1, 5, 16, 40)  # of contexts; sliding layers see 16 tokens
LIMITS = EngineLimits(len(LENGTHS), 64, PAGE, 8 * len(LENGTHS), 8 * len(LENGTHS))
PRECISIONS = (("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "fp8"))


Built = Callable[[str, str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def built(denoiser: Path, drafter: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Emulated engine directories of denoiser and drafter by precision and that of keys and values."""
    folder, made = tmp_path_factory.mktemp("emulated"), dict[tuple[str, str], tuple[Path, Path]]()

    def build(precision: str, kv: str) -> tuple[Path, Path]:
        if (precision, kv) not in made:
            own = folder / f"{precision}-{kv}"
            engine = build_emulated(denoiser, own, precision, kv)
            output = folder / f"{own.name}-drafter"
            made[precision, kv] = engine, build_emulated_drafter(drafter, denoiser, output, precision, kv)
        return made[precision, kv]

    return build


@pytest.fixture(params=PRECISIONS, ids="-".join)
def pair(request: pytest.FixtureRequest, built: Built) -> Iterator[tuple[Slots, Slots]]:
    """With the drafter and without."""
    engine, drafter = built(*request.param)
    engines = [open_emulated(engine, LIMITS, 1, draft_model) for draft_model in (drafter, None)]
    yield Slots(engines[0], LENGTHS), Slots(engines[1], LENGTHS)
    for one in engines:
        one.close()


@pytest.fixture
def expected(denoiser_engine: Path, drafter_engine: Path) -> Iterator[Slots]:
    """On ONNX Runtime, whose drafts are held to the torch module."""
    engine = OnnxRuntimeEngine(denoiser_engine, LIMITS, 1, drafter_engine)
    yield Slots(engine, LENGTHS)
    engine.close()


# Of confidences, at most and in the mean; least share of tokens that agree.
BARS = {"fp32": (1e-5, 1e-6, 1.0), "bf16": (0.02, 2e-3, 0.95), "fp8": (0.03, 4e-3, 0.9)}


def close(found: Slots, expected: Slots) -> None:
    rows = [found.draft_row(slot) for slot in (3, 0, 2, 1)]
    ours, theirs = found.engine.draft(rows), expected.engine.draft(rows)
    most, mean, agreeing = BARS[found.engine.manifest.kv_dtype]
    errors = np.abs(ours.confidences - theirs.confidences)
    assert errors.max() < most
    assert errors.mean() < mean
    assert (ours.token_ids == theirs.token_ids).mean() >= agreeing
    assert len(np.unique(ours.token_ids)) > CANVAS  # the contexts are told apart


def test_drafts_are_those_of_onnx_runtime(pair: tuple[Slots, Slots], expected: Slots) -> None:
    close(pair[0], expected)


def test_the_canvas_behind_a_commit_is_drafted_from_what_was_committed(
    pair: tuple[Slots, Slots], expected: Slots
) -> None:
    for slots in (pair[0], expected):
        slots.step(1, 3)
        slots.commit(3)
    close(pair[0], expected)


def test_a_row_alone_is_drafted_as_among_others(pair: tuple[Slots, Slots]) -> None:
    slots, _ = pair
    together = slots.engine.draft([slots.draft_row(slot) for slot in range(len(LENGTHS))])
    for slot in (3, 1, 0, 2):
        alone = slots.engine.draft([slots.draft_row(slot)])
        assert np.allclose(alone.confidences[0], together.confidences[slot], atol=1e-5)
        assert np.array_equal(alone.token_ids[0], together.token_ids[slot])


def test_a_draft_changes_nothing_of_the_steps_after_it(pair: tuple[Slots, Slots]) -> None:
    """Canvases at work, those that begin, and a commit between them: the same bits with drafts and without."""
    drafted, plain = pair
    for slots in pair:
        slots.step(0, 3)
    drafted.engine.draft([drafted.draft_row(slot) for slot in (1, 2)])  # begins again below
    same(drafted.step(0, 3, first=False), plain.step(0, 3, first=False))
    drafted.engine.draft([drafted.draft_row(slot) for slot in (2, 1)])
    same(drafted.step(1, 2), plain.step(1, 2))
    same(drafted.step(0, 1, 2, 3, first=False), plain.step(0, 1, 2, 3, first=False))
    for slots in pair:
        slots.commit(2)
    drafted.engine.draft([drafted.draft_row(2)])
    same(drafted.step(2), plain.step(2))
    same(drafted.step(2, 1, first=False), plain.step(2, 1, first=False))


def same(ours: DenoiseResult, theirs: DenoiseResult) -> None:
    assert np.array_equal(ours.argmax_ids, theirs.argmax_ids)
    assert np.array_equal(ours.sampled_ids, theirs.sampled_ids)
    assert np.array_equal(ours.entropies, theirs.entropies)


def test_a_context_is_laid_out_once_for_draft_and_step(pair: tuple[Slots, Slots]) -> None:
    drafted = pair[0]
    devices = [slots.engine._device for slots in pair]  # type: ignore[attr-defined]
    before = [device.copies for device in devices]
    drafted.engine.draft([drafted.draft_row(slot) for slot in range(len(LENGTHS))])
    for slots in pair:
        slots.step(*range(len(LENGTHS)))
    copies = [device.copies - count for device, count in zip(devices, before, strict=True)]
    assert copies[0] == copies[1] > len(LENGTHS)


def test_a_draft_that_fails_leaves_its_slots_free(pair: tuple[Slots, Slots], monkeypatch: pytest.MonkeyPatch) -> None:
    drafted, plain = pair

    def fail(*arguments: object) -> None:
        raise EngineError("a draft that fails for a test")

    for slots in pair:
        slots.step(3)
    with monkeypatch.context() as patch:
        patch.setattr(drafted.engine._drafter, "_run", fail)  # type: ignore[attr-defined]
        with pytest.raises(EngineError, match="fails for a test"):
            drafted.engine.draft([drafted.draft_row(0), drafted.draft_row(1)])
    same(drafted.step(0, 1), plain.step(0, 1))
    same(drafted.step(3, first=False), plain.step(3, first=False))


def test_a_slot_that_is_released_behind_its_draft_begins_again(pair: tuple[Slots, Slots]) -> None:
    drafted, plain = pair
    drafted.engine.draft([drafted.draft_row(0), drafted.draft_row(1)])
    drafted.engine.release(0)
    same(drafted.step(1, 0), plain.step(1, 0))


def test_without_memory_a_draft_does_not_count(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = open_emulated(*_with_limits(built), draft_model=built("bf16", "bf16")[1])
    slots = Slots(engine, LENGTHS)

    def full(*arguments: object) -> None:
        raise OutOfMemory(1, "the contexts of a test", 0)

    with monkeypatch.context() as patch:
        patch.setattr("dgemma_runtime.engines.tensorrt.Workspace", full)
        with pytest.raises(EngineMemoryError, match="the contexts of a test"):
            engine.draft([slots.draft_row(0)])
    first = engine.draft([slots.draft_row(0)])
    assert first.token_ids.shape == (1, CANVAS)
    device = engine._device
    engine.close()
    assert isinstance(device, HostDevice)
    assert device.live == 0


def _with_limits(built: Built) -> tuple[Path, EngineLimits, int]:
    return built("bf16", "bf16")[0], LIMITS, 1


# ---------------------------------------------------------------- what is refused


def test_the_manifest_tells_how_it_was_built(built: Built) -> None:
    engine, drafter = built("bf16", "fp8")
    manifest, found = Manifest.load(engine), DrafterManifest.load(drafter)
    assert (found.backend, found.precision, found.kv_dtype) == ("tensorrt", "bf16", "fp8")
    assert (found.target, found.denoiser_sha256) == ("emulation", manifest.checkpoint_sha256)
    assert (found.max_model_len, found.max_batch_size) == (manifest.max_model_len, manifest.max_batch_size)


def test_a_drafter_of_another_backend_is_refused(built: Built, drafter_engine: Path) -> None:
    words = "the drafter was built for onnxruntime, the engine for tensorrt; build it again"
    with pytest.raises(ConfigurationError, match=words):
        open_emulated(*_with_limits(built), draft_model=drafter_engine)


def test_a_drafter_of_another_kv_dtype_is_refused(built: Built) -> None:
    words = r"kv_dtype fp8, the engine's are bf16; build it again .* --kv-precision bf16"
    with pytest.raises(ConfigurationError, match=words):
        open_emulated(*_with_limits(built), draft_model=built("bf16", "fp8")[1])


def test_a_drafter_for_fewer_canvases_is_refused(built: Built, denoiser: Path, drafter: Path, tmp_path: Path) -> None:
    request = DrafterRequest(drafter, denoiser, tmp_path / "small", "tensorrt", "bf16", max_batch_size=2)
    build_drafter(request, backend=EmulatedBackend("tensorrt", "bf16", "bf16"))
    words = r"small/rank0.engine: .* profile 0 of the engine takes up to \(2,.* --max-batch-size"
    with pytest.raises(ManifestError, match=words):
        open_emulated(*_with_limits(built), draft_model=tmp_path / "small")


def test_engines_of_tensorrt_llm_take_no_drafter(built: Built, tmp_path: Path) -> None:
    engine, drafter = built("bf16", "bf16")
    (tmp_path / "rank0.engine").write_bytes((engine / "rank0.engine").read_bytes())
    files = {"rank0.engine": Manifest.load(engine).files["rank0.engine"]}
    replace(Manifest.load(engine), backend="tensorrt_llm", files=files).save(tmp_path)
    with pytest.raises(ConfigurationError, match="tensorrt_llm engines take no drafter; leave it out"):
        open_engine(tmp_path, RuntimeSettings(draft_model=str(drafter)))


@pytest.mark.parametrize(
    ("backend", "precision", "more", "words"),
    [
        ("tensorrt_llm", "bf16", {}, "--backend tensorrt_llm: drafters are built for onnxruntime, tensorrt, tensorrt_"),
        ("tensorrt_rtx", "fp8", {}, "--precision fp8: drafters are built in bf16 or fp32 for tensorrt_rtx"),
        ("onnxruntime", "bf16", {}, "--precision bf16: drafters are built in fp32 for onnxruntime"),
        ("onnxruntime", "fp32", {"max_batch_size": 3}, "--max-batch-size 3: onnxruntime's drafters have no such limit"),
        ("onnxruntime", "fp32", {"kv_precision": "fp8"}, "--kv-precision fp8: onnxruntime in fp32 is built with fp32"),
        ("tensorrt_rtx", "bf16", {"max_model_len": 7}, "--max-model-len 7: must be more than one canvas"),
        ("tensorrt_rtx", "bf16", {}, r"tensorrt_rtx 1\.\S+ (cannot build|does not take) the graph: \S"),  # odd heads
    ],
)
def test_what_cannot_be_built_is_refused_by_name(
    backend: str, precision: str, more: dict[str, Any], words: str, denoiser: Path, drafter: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=words):
        build_drafter(DrafterRequest(drafter, denoiser, tmp_path / "out", backend, precision, **more))
    assert not (tmp_path / "out").exists()


def test_memory_for_the_drafter_is_planned(built: Built) -> None:
    engine, drafter = built("bf16", "bf16")
    manifest, room = Manifest.load(engine), AvailableMemory(2**33, "a test")
    settings = RuntimeSettings(max_batch_size=2, max_model_len=256, draft_model=str(drafter))
    scratch = 12_345_678
    replace(DrafterManifest.load(drafter), scratch_bytes=scratch).save(drafter)
    plans = [plan_device_memory(10**6, manifest, one, room) for one in (settings, replace(settings, draft_model=None))]
    replace(DrafterManifest.load(drafter), scratch_bytes=0).save(drafter)
    ((words, nbytes),) = set(plans[0].uses) - set(plans[1].uses)
    assert words == "drafter"
    files = sum((drafter / name).stat().st_size for name in DrafterManifest.load(drafter).files)
    assert 0 < nbytes - files - scratch < 4096
    assert plans[0].total_bytes == plans[1].total_bytes + nbytes


# ---------------------------------------------------------------- the demo


def test_the_demo_drafter_builds_with_tensorrt_for_rtx(tmp_path: Path) -> None:
    output = tmp_path / "engine"
    words = ["engine", "--drafter", CHECKPOINTS / "demo-drafter", "--checkpoint", CHECKPOINTS / "demo"]
    words += ["--backend", "tensorrt_rtx", "--kv-precision", "fp8", "--max-batch-size", 2, "--output", output]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exception is None
    manifest = DrafterManifest.load(output)
    assert (manifest.backend, manifest.precision, manifest.kv_dtype) == ("tensorrt_rtx", "bf16", "fp8")
    assert (manifest.target, manifest.max_batch_size) == ("sm_89,sm_120", 2)
    assert manifest.max_model_len == 262_144
    assert 0 < manifest.scratch_bytes < 1e9
    assert list(manifest.files) == ["rank0.engine"]
    assert (output / "rank0.engine").stat().st_size > 1_000_000


def test_the_demo_drafter_drafts_as_on_onnx_runtime(tmp_path: Path) -> None:
    """Behind prompts of its skills, whose tokens it is sure of."""
    demo, trained = CHECKPOINTS / "demo", CHECKPOINTS / "demo-drafter"
    build_engine(BuildRequest(demo, tmp_path / "plain"))
    build_drafter(DrafterRequest(trained, demo, tmp_path / "plain-drafter"))
    build_emulated(demo, tmp_path / "bf16", "bf16", "fp8")
    build_emulated_drafter(trained, demo, tmp_path / "bf16-drafter", "bf16", "fp8")
    codec, limits = Codec.load(tmp_path / "plain"), EngineLimits(4, 256, 64, 8, 8)
    engines = (
        OnnxRuntimeEngine(tmp_path / "plain", limits, 1, tmp_path / "plain-drafter"),
        open_emulated(tmp_path / "bf16", limits, 1, tmp_path / "bf16-drafter"),
    )
    found = []
    for engine in engines:
        rows = []
        for slot, skill in enumerate(list(SKILLS)[:4]):
            ids = np.array(codec.encode(render_turn(held_out_set(skill, 1)[0].prompt)), np.int32)
            own = np.array([2 * slot, 2 * slot + 1], np.int32)
            pages = SequencePages(own, own)
            engine.encode([EncodeRow(ids, 0, pages)])
            rows.append(DraftRow(slot, len(ids), pages, int(ids[-1])))
        found.append(engine.draft(rows))
        engine.close()
    exact, ours = found
    sure = exact.confidences > 0.9
    assert sure.mean() > 0.5
    assert (exact.token_ids == ours.token_ids)[sure].mean() > 0.98
    assert np.abs(exact.confidences - ours.confidences).mean() < 0.02
