"""The drafter that is shipped belongs to the shipped denoiser, saves steps, and costs no right answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from dgemma_build.checkpoint import Checkpoint
from dgemma_build.drafter.card import card
from dgemma_build.drafter.checkpoint import DrafterCheckpoint
from dgemma_build.drafter.export import DrafterRequest, build_drafter
from dgemma_build.drafter.measure import measure
from dgemma_build.engine import BuildRequest, build_engine
from dgemma_runtime.parameters import VERIFICATIONS

CHECKPOINTS = Path(__file__).resolve().parents[2] / "build/checkpoints"
DEMO, DRAFTER = CHECKPOINTS / "demo", CHECKPOINTS / "demo-drafter"
COUNT = 6  # prompts of each skill


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Of the denoiser and of the drafter."""
    folder = tmp_path_factory.mktemp("demo")
    build_engine(BuildRequest(DEMO, folder / "denoiser"))
    build_drafter(DrafterRequest(DRAFTER, DEMO, folder / "drafter"))
    return folder / "denoiser", folder / "drafter"


def test_it_belongs_to_the_demonstration_checkpoint() -> None:
    denoiser = Checkpoint(DEMO)
    checkpoint = DrafterCheckpoint(DRAFTER, denoiser.config, denoiser.sha256())
    assert sum((DRAFTER / name).stat().st_size for name in ("config.json", "model.safetensors")) < 4e6
    assert f"{len(checkpoint.config.reads)}, over the keys and values" in (DRAFTER / "README.md").read_text()


def test_it_saves_steps_and_costs_no_right_answers(engines: tuple[Path, Path]) -> None:
    found, halves = measure(*engines, count=COUNT, threads=1, verifications=VERIFICATIONS)
    everything = found["groups"]["all"]
    assert everything["steps_share"] < 0.8
    assert everything["with"]["right"] >= everything["without"]["right"] - 1
    assert everything["with"]["one_pass"] > everything["with"]["canvases"] / 4
    assert everything["without"]["one_pass"] == 0
    assert [one["draft_verification"] for one in (found, halves)] == ["direct", "halves"]
    assert (halves["groups"]["all"]["without"], halves["calls"]) == (everything["without"], found["calls"])
    assert everything["steps_share"] <= halves["groups"]["all"]["steps_share"] < 1
    text = card(DRAFTER, found, prompts=1)
    assert f"| all | {everything['without']['steps_per_canvas']:.2f} |" in text
