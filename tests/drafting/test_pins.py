"""Pinned positions never differ: in what the denoiser sees, in what is committed, in what a client receives."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dgemma_build.accept.canvas_audit import audited
from dgemma_build.accept.table import NAMES, Setting
from dgemma_build.bench.inprocess import run_requests, running_service
from dgemma_build.demo.skills import SKILLS, held_out_set, sudoku_template
from dgemma_build.demo.tokenizer import render_turn
from dgemma_runtime.contract import Manifest
from dgemma_runtime.service import GenerationRequest

LITERALS, HOLES = ("ab", "c d: ", "x"), (3, 9, 1)


def template(turns: int) -> tuple[str | int, ...]:
    """Longer than a canvas of the odd checkpoints, with holes that go on in the next one."""
    return tuple(part for turn in range(turns) for part in (LITERALS[turn % 3], HOLES[turn % 3]))


@pytest.mark.parametrize("at_once", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_pins_never_differ(name: str, at_once: int, setting: Setting) -> None:
    directory = setting.engine(name)
    model = Manifest.load(directory).model
    prompts = [np.random.default_rng(seed).integers(20, model.vocab_size, 5 + 9 * seed) for seed in range(5)]
    with audited() as audit, running_service(directory, max_batch_size=at_once, threads=1) as service:
        requests = [
            GenerationRequest(
                prompt.astype(np.int32),
                replace(service.defaults, seed=seed, max_denoising_steps=4, drafter="off"),
                template=template(4 + seed),
            )
            for seed, prompt in enumerate(prompts)
        ]
        outcomes = run_requests(service, requests)
        audit.check(requests, outcomes, model)
        pieces = [[service.codec.encode(part)[1:].tolist() for part in LITERALS] for _ in requests]

    assert audit.faults == []
    for seed, outcome in enumerate(outcomes):
        finished, place = outcome.result(), 0
        for turn in range(4 + seed):
            literal = pieces[seed][turn % 3]
            assert finished.token_ids[place : place + len(literal)].tolist() == literal
            place += len(literal) + HOLES[turn % 3]
        assert (len(finished.token_ids), finished.reason) == (place, "stop")
    pinned = [record.pins for record in audit.ended.values() if record.pins is not None]
    assert len(pinned) >= 5
    assert any(not pins.pinned.all() for pins in pinned)


def test_a_sudoku_keeps_its_clues_and_is_solved(setting: Setting) -> None:
    examples = held_out_set("sudoku4", 10)
    with audited() as audit, running_service(setting.engine("demo"), threads=1) as service:
        requests = [
            GenerationRequest(
                render_turn(example.prompt),
                replace(service.defaults, seed=seed, drafter="off"),
                template=sudoku_template(example.prompt),
            )
            for seed, example in enumerate(examples)
        ]
        texts = [outcome.result().text for outcome in run_requests(service, requests)]

    assert audit.faults == []
    right = sum(SKILLS["sudoku4"].check(example.prompt, text) for example, text in zip(examples, texts, strict=True))
    assert right >= 9
