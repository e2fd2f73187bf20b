"""Whole generations of our service beside the oracle's, with shared randomness; near ties are told by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dgemma_build.bench.inprocess import run_requests
from dgemma_build.oracle import GenerationTrace, Model, trace_generation
from dgemma_runtime.contract import Int32Array
from dgemma_runtime.noise import CanvasNoise
from dgemma_runtime.parameters import GenerationParameters
from dgemma_runtime.service import GenerationRequest, Service

MARGIN = 1e-4  # below it a decision of the sampler is a near tie
ROUTING_MARGIN = 1e-6  # below it the router's choice of experts is one: the size of rounding errors in a probability


@dataclass(frozen=True)
class Case:
    """One request for both sides."""

    prompt: tuple[int, ...]
    seed: int
    canvases: int
    adaptive: bool  # stop by the checkpoint's rule, or after all steps
    max_denoising_steps: int | None = None  # None: the checkpoint's
    ends: bool = False  # whether the checkpoint's end tokens end the output


@dataclass(frozen=True)
class Comparison:
    """What came of one case."""

    case: Case
    steps: tuple[int, ...]  # of the oracle, per canvas
    near_ties: tuple[str, ...]  # of the oracle's run
    expected: Int32Array
    got: Int32Array

    @property
    def equal(self) -> bool:
        return np.array_equal(self.expected, self.got)

    @property
    def comfortable(self) -> bool:
        """The oracle's run has no near tie, so the tokens must be equal."""
        return not self.near_ties

    @property
    def failed(self) -> bool:
        return self.comfortable and not self.equal

    def describe(self) -> str:
        """One line: equal, different at a near tie (named), or wrong."""
        mode = "adaptive" if self.case.adaptive else "fixed steps"
        head = f"seed {self.case.seed}, {len(self.case.prompt)} prompt tokens, {mode}, steps {list(self.steps)}"
        if self.equal:
            return f"{head}: token-exact" + (f" in spite of {self.near_ties[0]}" if self.near_ties else "")
        shared = min(len(self.expected), len(self.got))
        unequal = np.flatnonzero(self.expected[:shared] != self.got[:shared])
        first = int(unequal[0]) if len(unequal) else shared
        if self.comfortable:
            return f"{head}: DIFFERENT from output token {first} on, without a near tie"
        return f"{head}: different from output token {first} on, after near tie {'; '.join(self.near_ties[:3])}"


def trace_case(model: Model, case: Case) -> GenerationTrace:
    """The oracle's side."""
    options: dict[str, object] = {"max_new_tokens": case.canvases * model.config.canvas_length}
    if not case.ends:
        options["eos_token_id"] = None
    if not case.adaptive:
        options["stability_threshold"] = None
    if case.max_denoising_steps is not None:
        options["max_denoising_steps"] = case.max_denoising_steps
    return trace_generation(model, case.prompt, case.seed, CanvasNoise, **options)


def request_of(case: Case, defaults: GenerationParameters, canvas_length: int) -> GenerationRequest:
    """Our side of a case."""
    parameters = replace(
        defaults,
        seed=case.seed,
        max_tokens=case.canvases * canvas_length,
        end_ids=defaults.end_ids if case.ends else (),
        stability_threshold=defaults.stability_threshold if case.adaptive else None,
        max_denoising_steps=case.max_denoising_steps or defaults.max_denoising_steps,
        drafter="off",  # the reference has none
    )
    return GenerationRequest(np.array(case.prompt, np.int32), parameters)


def near_ties(trace: GenerationTrace) -> tuple[str, ...]:
    """Every decision of the run that a rounding error may turn."""
    routing = [
        f"canvas {canvas.canvas_index} step {step.step}: routing margin {step.margins.routing:.1e}"
        for canvas in trace.canvases
        for step in canvas.steps
        if step.margins.routing < ROUTING_MARGIN
    ]
    return (*trace.near_ties(MARGIN), *routing)


def compare_generations(model: Model, service: Service, cases: Sequence[Case]) -> Iterator[Comparison]:
    """The cases one after the other, each alone in the service."""
    for case in cases:
        trace = trace_case(model, case)
        outcome = run_requests(service, [request_of(case, service.defaults, model.config.canvas_length)])[0]
        expected = _until_end(trace.output_ids, service.defaults.end_ids if case.ends else ())
        yield Comparison(
            case=case,
            steps=tuple(len(canvas.steps) for canvas in trace.canvases),
            near_ties=near_ties(trace),
            expected=expected,
            got=outcome.result().token_ids,
        )


def _until_end(ids: Int32Array, end_ids: Sequence[int]) -> Int32Array:
    """`ids` up to and with the first end token."""
    ends = np.flatnonzero(np.isin(ids, end_ids))
    return ids[: int(ends[0]) + 1] if len(ends) else ids
