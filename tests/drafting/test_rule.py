"""Whoever drafts: what is committed is the denoiser's argmax by the stopping rule. Seeds mean the same with drafts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dgemma_build.accept.canvas_audit import Audit, audited
from dgemma_build.accept.generations import request_of
from dgemma_build.accept.parity import cases_for
from dgemma_build.accept.table import NAMES, Setting
from dgemma_build.bench.inprocess import Outcome, run_requests, running_service
from dgemma_runtime.canvas import Canvas
from dgemma_runtime.contract import Float32Array, Int32Array, Manifest, ModelSpec
from dgemma_runtime.parameters import VERIFICATIONS, default_parameters
from dgemma_runtime.service import GenerationRequest

SMALL: dict[str, Any] = {"threads": 1, "max_model_len": 512, "page_size": 8, "prefix_cache": False}
Canvases = dict[tuple[int, int], list[list[int]]]  # by seed and canvas: the argmax of every step


def model_of(directory: Path) -> ModelSpec:
    return Manifest.load(directory, verify_hashes=False).model


def plain_requests(setting: Setting, name: str) -> list[GenerationRequest]:
    """Some of the checkpoint's prompts, a seed each."""
    manifest = Manifest.load(setting.engine(name))
    defaults = default_parameters(manifest.generation_defaults)
    length = manifest.model.canvas_length
    return [request_of(case, defaults, length) for case in cases_for(setting, name, adaptive=True)]


def run(
    directory: Path, requests: Sequence[GenerationRequest], at_once: int, **more: Any
) -> tuple[list[Outcome], Audit, int]:
    """All of them, their canvases audited; also how often one lost its pages."""
    model = model_of(directory)
    with audited() as audit, running_service(directory, max_batch_size=at_once, **SMALL | more) as service:
        outcomes = run_requests(service, requests)
        audit.check(requests, outcomes, model)
        preemptions = service.statistics().preemptions
    assert audit.faults == []
    assert len(audit.ended) == sum(len(outcome.commits) for outcome in outcomes)
    return outcomes, audit, preemptions


def canvases(directory: Path, requests: Sequence[GenerationRequest], at_once: int, **more: Any) -> tuple[Canvases, int]:
    outcomes, audit, preemptions = run(directory, requests, at_once, **more)
    found: Canvases = {}
    for request, outcome in zip(requests, outcomes, strict=True):
        seed = request.parameters.seed
        assert seed is not None
        for _, commit in outcome.commits:
            record = audit.of(seed, commit.canvas_index, model_of(directory))
            found[seed, commit.canvas_index] = [step.tolist() for step in record.argmax]
    return found, preemptions


def drafted(setting: Setting, name: str, verification: str) -> list[GenerationRequest]:
    """Drafts of every kind, by turns: the own output, that with wrong tokens, noise, its beginning, lookup, none."""
    directory = setting.engine(name)
    plain = plain_requests(setting, name)
    outputs = [outcome.result().token_ids for outcome in run(directory, plain, at_once=3)[0]]
    random, vocabulary = np.random.default_rng(3), model_of(directory).vocab_size
    requests = []
    for index, (request, output) in enumerate(zip(plain, outputs, strict=True)):
        noise = random.integers(0, vocabulary, len(output), np.int32)
        wrong = np.where(random.random(len(output)) < 0.15, noise, output)
        draft: Int32Array | None = [output, wrong, noise, output[: 1 + len(output) // 2], None, None][index % 6]
        changes: dict[str, Any] = {"draft_verification": verification}
        if index % 6 == 4:
            request = replace(
                request, prompt=np.tile(np.asarray(request.prompt, np.int32), 2)
            )  # so that its end recurs
            changes["drafter"] = "lookup"
        elif draft is not None:
            changes["drafter"] = "auto"
        requests.append(replace(request, parameters=replace(request.parameters, **changes), draft=draft))
    return requests


@pytest.mark.parametrize("verification", VERIFICATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_committed_is_the_denoisers_argmax(name: str, verification: str, setting: Setting) -> None:
    _, audit, _ = run(setting.engine(name), drafted(setting, name, verification), at_once=3)

    records = audit.ended.values()
    sources = [record.proposal.source for record in records if record.proposal is not None]
    assert len(sources) >= 5
    assert set(sources) == {"client", "lookup"}
    if name == "demo" and verification == "direct":  # random weights are never as sure
        assert any(len(record.argmax) == 1 for record in records), "no draft was accepted whole"
    assert any(len(record.argmax) > 2 for record in records)


def test_the_audit_sees_a_draft_that_is_committed_as_such(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    advance = Canvas.advance

    def rubber_stamp(canvas: Canvas, argmax_ids: Int32Array, sampled_ids: Int32Array, entropies: Float32Array) -> bool:
        done = advance(canvas, argmax_ids, sampled_ids, entropies)
        if canvas._proposal is None:
            return done
        draft = canvas._proposal.token_ids
        canvas.argmax_ids = np.where(draft < 0, argmax_ids, draft)
        return True

    requests = drafted(setting, "odd_a", "direct")
    monkeypatch.setattr(Canvas, "advance", rubber_stamp)
    with audited() as audit, running_service(setting.engine("odd_a"), **SMALL) as service:
        run_requests(service, requests)
    assert "the committed canvas is not the denoiser's argmax" in {fault.rpartition(": ")[2] for fault in audit.faults}


# ---------------------------------------------------------------- oracle


@pytest.mark.parametrize("verification", VERIFICATIONS)
def test_the_own_text_stays_as_it_is(verification: str, setting: Setting) -> None:
    directory = setting.engine("demo")
    plain = plain_requests(setting, "demo")
    before = run(directory, plain, at_once=3)[0]
    requests = [
        replace(
            request,
            parameters=replace(request.parameters, drafter="auto", draft_verification=verification),
            draft=outcome.result().token_ids,
        )
        for request, outcome in zip(plain, before, strict=True)
    ]
    after = run(directory, requests, at_once=3)[0]

    texts = [(one.result().text, other.result().text) for one, other in zip(before, after, strict=True)]
    steps = [commit.steps for outcome in after for _, commit in outcome.commits]
    print(f"{verification}: {steps.count(1)} of {len(steps)} canvases in one pass")
    assert [pair for pair in texts if pair[0] != pair[1]] == []
    if verification == "direct":
        assert steps.count(1) >= 0.95 * len(steps)
    else:
        assert steps.count(1) >= 0.5 * len(steps)


# ---------------------------------------------------------------- seeds


@pytest.mark.parametrize("verification", VERIFICATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_a_seed_means_the_same_alone_and_in_company(name: str, verification: str, setting: Setting) -> None:
    """With halves: alone there is no slot to lend, with few companions there is one, with many there is none."""
    directory, requests = setting.engine(name), drafted(setting, name, verification)
    alone, _ = canvases(directory, requests, at_once=1)
    for at_once in (3, 16):
        assert canvases(directory, requests, at_once)[0] == alone


@pytest.mark.parametrize("verification", VERIFICATIONS)
def test_a_seed_means_the_same_after_a_preemption(verification: str, setting: Setting) -> None:
    directory = setting.engine("odd_a")
    requests = [
        replace(request, parameters=replace(request.parameters, max_tokens=200, max_denoising_steps=5))
        for request in drafted(setting, "odd_a", verification)
    ]
    roomy, none = canvases(directory, requests, at_once=6)
    tight, some = canvases(directory, requests, at_once=6, max_model_len=256, full_pages=40)
    assert (none, some > 0) == (0, True)
    assert tight == roomy
