"""Whole generations: our service against `generate` with shared randomness, token for token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from dgemma_build.accept.generations import Case, compare_generations, request_of
from dgemma_build.bench.inprocess import run_requests, running_service
from dgemma_build.demo.skills import SKILLS, held_out_set
from dgemma_build.demo.tokenizer import render_turn
from dgemma_build.model_errors import MODEL_ERRORS
from dgemma_build.oracle import Model

Oracle = Callable[[str], Model]
Directory = Callable[[str], Path]


def random_cases(model: Model, seeds: range, adaptive: bool) -> list[Case]:
    """Prompts below, at and above the window."""
    text = model.config.text_config
    cases = []
    for seed in seeds:
        length = (text.sliding_window // 2, text.sliding_window, 3 * text.sliding_window)[seed % 3]
        prompt = np.random.default_rng(seed).integers(0, text.vocab_size, length)
        cases.append(Case(tuple(prompt.tolist()), seed, canvases=2 + seed % 2, adaptive=adaptive))
    return cases


def demo_cases(directory: Path, adaptive: bool) -> list[Case]:
    """Held-out prompts of every skill; the answers of `table` take several canvases."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    examples = [example for skill in SKILLS for example in held_out_set(skill, 8 if skill == "table" else 2)]
    steps = 10 if adaptive else 8
    return [
        Case(tuple(tokenizer.encode(render_turn(example.prompt)).ids), seed, 3, adaptive, steps, ends=True)
        for seed, example in enumerate(examples)
    ]


@pytest.mark.parametrize("adaptive", [True, False], ids=["adaptive", "fixed"])
@pytest.mark.parametrize("name", ["demo", "odd_a", "odd_b"])
def test_token_exact_where_no_decision_is_a_near_tie(
    name: str, adaptive: bool, oracle: Oracle, engine_directory: Directory, checkpoint: Directory
) -> None:
    model = oracle(name)
    cases = demo_cases(checkpoint(name), adaptive) if name == "demo" else random_cases(model, range(12), adaptive)

    with running_service(engine_directory(name), threads=1) as service:
        comparisons = list(compare_generations(model, service, cases))

    for comparison in comparisons:
        print(comparison.describe())
    comfortable = [comparison for comparison in comparisons if comparison.comfortable]
    assert [comparison.describe() for comparison in comparisons if comparison.failed] == []
    assert len(comfortable) >= 3, "too few runs without near ties to conclude anything"
    assert any(len(comparison.steps) > 1 for comparison in comfortable)


def test_a_model_error_shows_in_the_tokens(oracle: Oracle, engine_directory: Directory) -> None:
    model = oracle("odd_a")
    cases = random_cases(model, range(2), adaptive=True)

    with MODEL_ERRORS["window one shorter"](model), running_service(engine_directory("odd_a"), threads=1) as service:
        comparisons = list(compare_generations(model, service, cases))

    assert not any(comparison.equal for comparison in comparisons)


@pytest.mark.parametrize("name", ["odd_a", "odd_b"])
def test_company_does_not_change_a_request(name: str, oracle: Oracle, engine_directory: Directory) -> None:
    model = oracle(name)
    cases = random_cases(model, range(8), adaptive=True)

    with running_service(engine_directory(name), max_batch_size=3, threads=1) as service:
        requests = [request_of(case, service.defaults, model.config.canvas_length) for case in cases]
        alone = [run_requests(service, [request])[0].result().token_ids for request in requests]
        busy = [outcome.result().token_ids for outcome in run_requests(service, requests, stagger_s=0.02)]

    for one, other in zip(alone, busy, strict=True):
        np.testing.assert_array_equal(one, other)
