"""Cached prefixes under the real engine: the same tokens as the oracle, and with a seed the same bits as without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dgemma_build.accept.generations import Case, compare_generations, request_of
from dgemma_build.bench.inprocess import run_requests, running_service
from dgemma_build.oracle import Model
from dgemma_runtime.contract import CommitRow, DenoiseResult, DenoiseRow
from dgemma_runtime.engines.onnxruntime import OnnxRuntimeEngine
from dgemma_runtime.requests import LiveRequest
from dgemma_runtime.service import Service

Oracle = Callable[[str], Model]
Directory = Callable[[str], Path]
SMALL: dict[str, Any] = {"page_size": 4, "prefill_chunk": 12, "prefill_budget": 24, "threads": 1}


def prompt(model: Model, tokens: int, seed: int = 0) -> tuple[int, ...]:
    text = model.config.text_config
    return tuple(np.random.default_rng(seed).integers(0, text.vocab_size, tokens).tolist())


def prefix_tokens(service: Service, case: Case, canvas_length: int) -> int:
    outcome = run_requests(service, [request_of(case, service.defaults, canvas_length)])[0]
    return outcome.result().statistics.prefix_tokens


@pytest.mark.parametrize("name", ["odd_a", "odd_b"])
def test_any_rest_of_a_prompt_is_token_exact(
    name: str, oracle: Oracle, engine_directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts below and above the window, found up to their last `tail` tokens; among them none and one."""
    model = oracle(name)
    window, length = model.config.text_config.sliding_window, model.config.canvas_length
    monkeypatch.setattr(LiveRequest, "is_exact", property(lambda self: False))  # seeds, and every page counts
    checked = set()
    with running_service(engine_directory(name), **SMALL) as service:
        for seed, (tail, pages) in enumerate(product((0, 1, 2, 5), (2, window // 4 + 1, window // 2 + 3))):
            whole = prompt(model, 4 * pages + tail, seed)
            first = Case(whole[: 4 * pages], seed, canvases=1, adaptive=True)
            assert prefix_tokens(service, first, length) == 0
            case = Case(whole, seed, canvases=1, adaptive=True)
            (comparison,) = compare_generations(model, service, [case])
            assert not comparison.failed, comparison.describe()
            if comparison.comfortable:
                checked.add(tail)
            assert prefix_tokens(service, case, length) == 4 * pages + tail // 4 * 4
    assert {0, 1} <= checked, "only near ties elsewhere, so nothing was compared"


@pytest.mark.parametrize("name", ["odd_a", "demo"])
def test_the_next_turn_is_token_exact(name: str, oracle: Oracle, engine_directory: Directory) -> None:
    model, checked = oracle(name), 0
    length = model.config.canvas_length
    with running_service(engine_directory(name), **SMALL) as service:
        for seed in range(4):
            first = Case(prompt(model, 70, seed), seed, canvases=3, adaptive=True)
            answer = run_requests(service, [request_of(first, service.defaults, length)])[0].result()
            turn = Case((*first.prompt, *answer.token_ids.tolist(), *prompt(model, 9, 100 + seed)), seed, 2, True)
            (comparison,) = compare_generations(model, service, [turn])
            assert not comparison.failed, comparison.describe()
            checked += comparison.comfortable
        assert service.statistics().prefix_hits >= 4 * 60, "each second turn found the whole chunks of the first"
    assert checked


class Recording(OnnxRuntimeEngine):
    """Keeps every entropy it returns."""

    entropies: list[bytes]

    def denoise(self, rows: Sequence[DenoiseRow], commits: Sequence[CommitRow] = ()) -> DenoiseResult:
        result = super().denoise(rows, commits)
        self.entropies.append(result.entropies.tobytes())
        return result


@pytest.mark.parametrize("name", ["odd_a", "demo"])
def test_a_seeded_request_has_the_same_bits_with_and_without_the_cache(
    name: str, oracle: Oracle, engine_directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever filled the cache, and wherever it was cut then."""
    monkeypatch.setattr("dgemma_build.bench.inprocess.OnnxRuntimeEngine", Recording)
    model = oracle(name)
    case = Case(prompt(model, 70), 5, canvases=2, adaptive=False, max_denoising_steps=3)
    runs, found = [], []
    for cache in (False, True):
        with running_service(engine_directory(name), prefix_cache=cache, **SMALL) as service:
            engine = service._engine
            assert isinstance(engine, Recording)
            engine.entropies = []
            for tokens in (27, 30, 55):  # ends that are no chunk's end
                other = Case((*case.prompt[:tokens], *prompt(model, 20, tokens)), 1, canvases=1, adaptive=True)
                request = request_of(other, service.defaults, model.config.canvas_length)
                run_requests(service, [request])
            for _ in range(2):
                engine.entropies.clear()
                found.append(prefix_tokens(service, case, model.config.canvas_length))
                runs.append(list(engine.entropies))
    assert found[:2] == [0, 0]
    assert 0 < found[2] < found[3] == 60
    assert runs[0] == runs[1] == runs[2] == runs[3]
