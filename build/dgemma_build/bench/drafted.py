"""Requests with and without drafts, on our service in this process: what came out, and in how many steps.

Knows no task and no drafter.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dgemma_build.bench.inprocess import Outcome, run_requests
from dgemma_runtime.contract import Int32Array
from dgemma_runtime.parameters import parse_parameters
from dgemma_runtime.service import GenerationRequest, Service
from dgemma_runtime.statistics import DraftStatistics

MAX_TOKENS = 512
QUEUE_SIZE = 2048  # requests that a service of these runs must let wait


@dataclass(frozen=True)
class Answer:
    """What one request received."""

    token_ids: Int32Array  # [n], the end token included
    text: str
    steps: tuple[int, ...]  # denoising steps of each canvas
    drafts: tuple[DraftStatistics, ...] = ()  # by drafter, of those that drafted something

    @staticmethod
    def of(outcome: Outcome) -> Answer:
        finished = outcome.result()
        steps = tuple(commit.steps for _, commit in outcome.commits)
        return Answer(finished.token_ids, finished.text, steps, finished.statistics.drafts)


@dataclass(frozen=True)
class Answers:
    """What requests of one moment received."""

    each: tuple[Answer, ...]
    seconds: float  # from the first request to the end of the last

    @property
    def steps(self) -> Int32Array:
        """[canvases], of all requests."""
        return np.array([steps for answer in self.each for steps in answer.steps], np.int32)

    @property
    def steps_per_canvas(self) -> float:
        return float(self.steps.mean())

    def undrafted(self, drafter: str) -> int:
        """Canvases that no draft of this drafter was shown in."""
        drafted = sum(found.canvases for answer in self.each for found in answer.drafts if found.drafter == drafter)
        return len(self.steps) - drafted

    @property
    def tokens_per_second(self) -> float:
        return sum(len(answer.token_ids) for answer in self.each) / self.seconds


def ask(
    service: Service,
    prompts: Sequence[str | Int32Array],
    drafts: Sequence[Int32Array | None] | None = None,
    templates: Sequence[tuple[str | int, ...]] | None = None,
    **parameters: object,
) -> Answers:
    """All prompts at once, with seeds 0, 1, ... and, by place, a client's draft or template; waits for every answer."""
    requests = [
        GenerationRequest(
            prompt,
            parse_parameters({"seed": seed, "max_tokens": MAX_TOKENS, **parameters}, service.defaults),
            draft=None if drafts is None else drafts[seed],
            template=() if templates is None else templates[seed],
        )
        for seed, prompt in enumerate(prompts)
    ]
    started = time.perf_counter()
    outcomes = run_requests(service, requests)
    return Answers(tuple(map(Answer.of, outcomes)), time.perf_counter() - started)
