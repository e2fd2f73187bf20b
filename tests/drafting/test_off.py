"""Without a draft nothing has changed: the plain loop's very rows and bits, and a drafter of nothing is no drafter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dgemma_build.accept.generations import Case, request_of
from dgemma_build.accept.parity import cases_for
from dgemma_build.accept.table import NAMES, Setting
from dgemma_build.bench.inprocess import run_requests, running_service
from dgemma_runtime.contract import (
    CommitRow,
    DenoiseResult,
    DenoiseRow,
    EncodeRow,
    Engine,
    EngineLimits,
    Manifest,
    SequencePages,
)
from dgemma_runtime.drafting.drafting import Drafting
from dgemma_runtime.drafting.proposal import lay_out
from dgemma_runtime.engines.onnxruntime import OnnxRuntimeEngine
from dgemma_runtime.noise import CanvasNoise
from dgemma_runtime.parameters import GenerationParameters, default_parameters
from dgemma_runtime.requests import LiveRequest
from dgemma_runtime.sampler import accept, mean_entropy, temperature
from dgemma_runtime.service import GenerationRequest

Trace = list[tuple[object, ...]]  # what every pass was given, and what it gave


class Recording(OnnxRuntimeEngine):
    """Writes down every pass of one sequence."""

    trace: Trace

    def denoise(self, rows: Sequence[DenoiseRow], commits: Sequence[CommitRow] = ()) -> DenoiseResult:
        result = super().denoise(rows, commits)
        for row in rows:
            given = (row.canvas_ids.tolist(), row.uniforms.tobytes(), row.temperature, row.position, row.first_step)
            self.trace.append((*given, result.argmax_ids[0].tolist(), result.entropies[0].tobytes()))
        for commit in commits:
            self.trace.append((commit.position, commit.token_ids.tolist()))
        return result


def served(directory: Path, request: GenerationRequest, monkeypatch: pytest.MonkeyPatch) -> Trace:
    """A service of one slot."""
    monkeypatch.setattr("dgemma_build.bench.inprocess.OnnxRuntimeEngine", Recording)
    with running_service(directory, max_batch_size=1, threads=1, max_model_len=512) as service:
        engine: Any = service._engine
        engine.trace = []
        run_requests(service, [request])[0].result()
        found: Trace = engine.trace
        return found


def plain(directory: Path, request: GenerationRequest, canvases: int) -> Trace:
    """The loop as the model's authors give it, on the engine alone."""
    limits = EngineLimits(1, 512, 64, 8, 8)
    engine = Recording(directory, limits, threads=1)
    engine.trace = []
    pages = SequencePages(np.arange(8, dtype=np.int32), np.arange(8, dtype=np.int32))
    prompt = np.asarray(request.prompt, np.int32)
    engine.encode([EncodeRow(prompt, 0, pages)])
    position = len(prompt)
    for index in range(canvases):
        ids = _plain_canvas(engine, pages, position, request.parameters, index)
        ended = index == canvases - 1 or bool(np.isin(ids, request.parameters.end_ids).any())
        if ended:
            break
        engine.denoise([], [CommitRow(0, ids, position, pages)])
        position += len(ids)
    engine.close()
    return engine.trace


def _plain_canvas(engine: Engine, pages: SequencePages, position: int, given: GenerationParameters, index: int) -> Any:
    model, most = engine.manifest.model, given.max_denoising_steps
    noise = CanvasNoise(given.seed or 0, index, model.canvas_length, model.vocab_size)
    ids, previous = noise.initial(), None
    for step in range(most):
        heat = temperature(most - step, most, given.t_min, given.t_max)
        row = DenoiseRow(0, ids, noise.uniforms(step), heat, position, pages, step == 0)
        result = engine.denoise([row])
        argmax, sampled, entropies = (one[0] for one in (result.argmax_ids, result.sampled_ids, result.entropies))
        sure = given.confidence_threshold is not None and mean_entropy(entropies) < np.float32(
            given.confidence_threshold
        )
        if given.stability_threshold == 1 and sure and previous is not None and np.array_equal(previous, argmax):
            break
        previous = argmax.copy()
        ids = np.where(accept(entropies, given.entropy_bound), sampled, noise.renoise(step))
    return argmax.copy()


@pytest.fixture(params=NAMES)
def directory(request: pytest.FixtureRequest, setting: Setting) -> Path:
    return setting.engine(request.param)


def cases(setting: Setting, directory: Path, adaptive: bool) -> list[tuple[Case, GenerationRequest]]:
    """Two prompts of the checkpoint, of two canvases."""
    manifest = Manifest.load(directory)
    defaults = default_parameters(manifest.generation_defaults)
    name = directory.name.removesuffix("-fp32")
    chosen = [replace(case, canvases=2) for case in cases_for(setting, name, adaptive)[2:8:4]]
    return [(case, request_of(case, defaults, manifest.model.canvas_length)) for case in chosen]


@pytest.mark.parametrize("adaptive", [True, False], ids=["adaptive", "fixed"])
def test_off_is_the_plain_loop_bit_for_bit(
    directory: Path, adaptive: bool, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    for case, request in cases(setting, directory, adaptive):
        assert request.parameters.drafter == "off"
        found = served(directory, request, monkeypatch)
        assert len(found) >= 3
        assert found == plain(directory, request, case.canvases)


def test_a_null_drafter_is_no_drafter(directory: Path, setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uniform noise, the whole schedule, no credit; in either verification."""
    asked, length = 0, Manifest.load(directory).model.canvas_length

    def propose_nothing(drafting: Drafting, requests: Sequence[LiveRequest]) -> None:
        nonlocal asked
        for live in requests:
            asked += 1
            live.drafts.proposal = lay_out(np.empty(0, np.int32), np.empty(0, np.float32), length, "null")

    for _, request in cases(setting, directory, adaptive=True):
        off = served(directory, request, monkeypatch)
        for verification in ("direct", "halves"):
            null = replace(request, parameters=replace(request.parameters, draft_verification=verification))
            with monkeypatch.context() as patch:
                patch.setattr(Drafting, "propose", propose_nothing)
                assert served(directory, null, patch) == off
    assert asked
