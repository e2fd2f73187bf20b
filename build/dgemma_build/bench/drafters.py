"""Engines of drafters for the benchmark's models: the demo's own, and one of random weights. Measures nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from dgemma_build.bench.__main__ import DEMO, GENERATED, ROOT
from dgemma_build.bench.scenario import Scenario
from dgemma_build.checkpoint import Checkpoint
from dgemma_build.drafter.checkpoint import expected_shapes, write_drafter
from dgemma_build.drafter.export import DrafterRequest, build_drafter
from dgemma_build.plan.drafter import plan_drafter


def demo_drafter() -> Path:
    """The engine of the drafter that is shipped with the demo checkpoint."""
    return _engine(ROOT / "build/checkpoints/demo-drafter", DEMO)


def random_drafter(scenario: Scenario) -> Path:
    """Of the sizes that `dgemma-build plan` gives a drafter: its drafts are worth nothing, their cost is real."""
    denoiser = Checkpoint(scenario.checkpoint)
    config = replace(plan_drafter(denoiser.config).config, denoiser_sha256=denoiser.sha256())
    random = np.random.default_rng(0)
    tensors = {
        name: np.ones(shape, np.float32)
        if len(shape) == 1
        else random.standard_normal(shape, np.float32) * np.float32(shape[-1] ** -0.5)
        for name, shape in expected_shapes(config, denoiser.config).items()
    }
    checkpoint = GENERATED / "checkpoints" / f"{scenario.checkpoint.name}-drafter"
    write_drafter(checkpoint, config, tensors)
    return _engine(checkpoint, scenario)


def _engine(checkpoint: Path, scenario: Scenario) -> Path:
    output = GENERATED / "engines" / checkpoint.name
    output.parent.mkdir(parents=True, exist_ok=True)
    build_drafter(DrafterRequest(checkpoint, scenario.checkpoint, output))
    return output
