"""The audit sees canvases behind a hole as it sees others, and says so where it saw none."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dgemma_build.accept.canvas_audit import Audit, audited
from dgemma_build.accept.table import Setting
from dgemma_build.bench.inprocess import run_requests, running_service
from dgemma_runtime.contract import Manifest
from dgemma_runtime.drafting.hole import HoleCanvas
from dgemma_runtime.service import GenerationRequest

SUFFIXES = ("ab", "c d: x", "one two")


def run(setting: Setting) -> Audit:
    """Requests with suffixes on the odd denoiser."""
    directory = setting.engine("odd_a")
    prompts = [np.arange(20, 30 + 9 * seed, dtype=np.int32) for seed in range(len(SUFFIXES))]
    with audited() as audit, running_service(directory, max_batch_size=2, threads=1) as service:
        requests = [
            GenerationRequest(
                prompt, replace(service.defaults, seed=seed, max_denoising_steps=4, max_tokens=7), suffix=SUFFIXES[seed]
            )
            for seed, prompt in enumerate(prompts)
        ]
        outcomes = run_requests(service, requests)
    audit.check(requests, outcomes, Manifest.load(directory).model)
    return audit


def test_canvases_of_suffixes_are_held_to_the_rule(setting: Setting) -> None:
    audit = run(setting)
    assert audit.faults == []
    assert len(audit.ended) == len(SUFFIXES)
    assert all(record.pins is not None and record.pins.pinned.any() for record in audit.ended.values())


def test_another_suffix_in_a_canvas_is_seen(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = HoleCanvas._begin

    def begin_elsewhere(canvas: HoleCanvas, *arguments: object) -> None:
        begin(canvas, *arguments)  # type: ignore[arg-type]
        canvas.ids = np.roll(canvas.ids, 1)

    monkeypatch.setattr(HoleCanvas, "_begin", begin_elsewhere)
    assert any("the denoiser was shown something else than a pin" in fault for fault in run(setting).faults)


def test_an_audit_of_nothing_is_a_fault() -> None:
    assert Audit().faults == ["the audit saw no canvas"]
