"""Runs cases and steps on a machine and makes rows of them: a failure is a row, never the end. Knows no kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from dgemma_build.gpu_check.cases import Case, all_cases, in_words
from dgemma_build.gpu_check.inputs import Canvases
from dgemma_build.gpu_check.machine import Machine
from dgemma_build.gpu_check.results import Bar, Card, Check, Row
from dgemma_build.gpu_check.sizes import PRECISIONS, ModelSizes, Scope
from dgemma_build.gpu_check.step import Step, StepResult
from dgemma_build.gpu_check.step_parts import step_parts
from dgemma_build.gpu_check.step_reference import step_checks
from dgemma_build.gpu_check.step_weights import StepWeights, random_inputs, random_weights

STEP_BAR = 1.25  # of the weight-read floor, in fp8
SMALL_BRANCH = 0.1  # so that after 30 layers tokens are still as different as when they came


@dataclass(frozen=True)
class Bench:
    """One card with what is to be measured on it."""

    machine: Machine
    sizes: ModelSizes
    scope: Scope
    card: Card

    def rows(self, only: str = "") -> Iterator[Row]:
        """Every row whose name contains `only`, as it is ready."""
        for case in all_cases(self.sizes, self.scope):
            if only in case.name:
                yield from self._guarded(case.name, partial(self._case, case))
        for precision in PRECISIONS:
            numbers = f"step {precision}, 2 layers, 2 canvases and 1 commit"
            if only in numbers:
                yield from self._guarded(numbers, partial(self._numbers, numbers, precision))
            whole = f"step {precision}, {self.scope.layers} layers"
            steps = {f"{whole}, {name}": rows for name, rows in self._whole_steps().items()}
            if chosen := {name: rows for name, rows in steps.items() if only in name}:
                yield from self._guarded(whole, partial(self._steps, chosen, precision))

    def _whole_steps(self) -> dict[str, Canvases]:
        """What is measured with all layers, by name. A commit's cost is what it adds to the others' step."""
        canvas, most = self.sizes.canvas, self.scope.full_step
        steps = {f"1 canvas behind {each:,}": Canvases(1, canvas, each, True) for each in self.scope.step_contexts}
        context, others = self.scope.step_contexts[0], most - 1
        steps[f"{in_words(others)} behind {context:,}"] = Canvases(others, canvas, context, True)
        name = f"{in_words(others)} and 1 commit behind {context:,}"
        steps[name] = Canvases(most, canvas, context, True, commits=1)
        return steps

    def _guarded(self, name: str, make: Callable[[], Iterator[Row]]) -> Iterator[Row]:
        """One kernel that does not run must not cost the figures of the others. Gives back what the one before held."""
        try:
            self.machine.release()
            yield from make()
        except Exception as error:  # noqa: BLE001 - whatever a compiler, a driver or a kernel raises belongs in the row
            yield Row(name, error=f"{type(error).__name__}: {' '.join(str(error).split())[:400]}")

    def _case(self, case: Case) -> Iterator[Row]:
        machine = self.machine
        prepared = case.prepare(machine)
        checks = prepared.check()
        machine.wait()
        timing = machine.time(prepared.run, self.scope.repetitions)
        work, seconds = prepared.work, timing.median_ms / 1e3
        share = work.bytes / seconds / self.card.bandwidth
        bar = case.bandwidth_bar
        yield Row(
            case.name,
            checks,
            timing.median_ms,
            timing.least_ms,
            work,
            bandwidth_share=share,
            flops_share=work.flops / seconds / self.card.bf16_flops,
            bar=None if bar is None else Bar("share of the measured bandwidth", share, bar, at_least=True),
        )

    def _cache(self, precision: str) -> torch.dtype:
        return torch.float8_e4m3fn if precision == "fp8" else self.sizes.dtype

    def _numbers(self, name: str, precision: str) -> Iterator[Row]:
        """A layer of each kind against PyTorch, with branches as large as the residual."""
        kinds = (self.sizes.sliding, self.sizes.full)
        rows = Canvases(3, self.sizes.canvas, self.scope.step_contexts[0], True, commits=1)
        weights = random_weights(self.machine, self.sizes, kinds, precision, branch=1.0)
        inputs = random_inputs(self.machine, self.sizes, kinds, rows, self._cache(precision))
        _, checks = step_checks(Step(self.machine, self.sizes, weights, inputs), rows, precision)
        self.machine.wait()
        yield Row(name, checks)

    def _steps(self, steps: dict[str, Canvases], precision: str) -> Iterator[Row]:
        """Each over the same weights."""
        kinds = tuple(self.sizes.layers(self.scope.layers))
        weights = random_weights(self.machine, self.sizes, kinds, precision, SMALL_BRANCH)
        for name, rows in steps.items():
            inputs = random_inputs(self.machine, self.sizes, kinds, rows, self._cache(precision))
            step = Step(self.machine, self.sizes, weights, inputs)
            first = rows == Canvases(1, self.sizes.canvas, self.scope.step_contexts[0], True)
            bar = STEP_BAR if precision == "fp8" and first else None
            yield self._step(name, step, bar)

    def _step(self, name: str, step: Step, bar: float | None) -> Row:
        machine, scope = self.machine, self.scope
        result = step.run()
        machine.wait()
        finite = bool(torch.isfinite(result.hidden).all() & torch.isfinite(result.head.entropy).all())
        timing = machine.time(step.run, scope.step_repetitions)
        parts = {
            part: machine.time(run, scope.step_repetitions).median_ms for part, run in step_parts(step, result).items()
        }
        reached, bytes_ = weights_read(step.weights, result)
        floor_ms = 1e3 * bytes_ / self.card.bandwidth
        ratio = timing.median_ms / floor_ms
        details = {
            "floor_ms": floor_ms,
            "times_floor": ratio,
            "weight_bytes_read": bytes_,
            "experts_reached_least": min(reached),
            "experts_reached_mean": sum(reached) / len(reached),
            "parts_ms": parts | {"between": timing.median_ms - sum(parts.values())},
        }
        return Row(
            name,
            (Check("results that are not finite", float(not finite), 0.0),),
            timing.median_ms,
            timing.least_ms,
            bar=None if bar is None else Bar("times the weight-read floor", ratio, bar, at_least=False),
            details=details,
        )


def weights_read(weights: StepWeights, result: StepResult) -> tuple[list[int], float]:
    """Experts reached in each layer, and bytes of all weights that a step needs, each once."""
    reached = [len(torch.unique(chosen)) for chosen in result.chosen]
    experts = sum(count * layer.one_expert_bytes() for count, layer in zip(reached, weights.layers, strict=True))
    return reached, weights.shared_bytes() + experts
