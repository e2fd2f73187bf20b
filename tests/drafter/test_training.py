"""Training takes the same steps again, resumed or not, and learns; records come from the denoiser itself."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from dgemma_build.checkpoint import Checkpoint
from dgemma_build.drafter import data, train
from dgemma_build.drafter.checkpoint import WEIGHTS_FILE, DrafterCheckpoint
from dgemma_build.drafter.data import Distiller, Prompt, Record, read_prompts, read_records
from dgemma_runtime.errors import CheckpointError, ConfigurationError

CANVAS = 12
PROMPTS = [
    Prompt("short", "Name a river"),
    Prompt("longer", "Write all the numbers from one to twelve"),
    Prompt("x", "?"),
]
Trainer = Callable[..., Path]


@pytest.fixture(scope="module")
def records(denoiser_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the odd denoiser answers."""
    folder = tmp_path_factory.mktemp("records")
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"text_input": p.text, "group": p.group}) + "\n" for p in PROMPTS))
    output = folder / "records.jsonl"
    data.main(["--engine", str(denoiser_engine), "--output", str(output), "--prompts", str(prompts), "--threads", "1"])
    return output


@pytest.fixture
def run(denoiser: Path, records: Path, tmp_path: Path) -> Trainer:
    def run(name: str, *more: str, steps: int = 6) -> Path:
        words = ["--checkpoint", denoiser, "--data", records, "--held-out", records, "--output", tmp_path / name]
        words += ["--steps", steps, "--batch", 8, "--threads", 1, "--hidden-size", 24, "--intermediate-size", 32]
        words += ["--heads", 6, "--reads", 1, 2, *more]
        train.main([str(word) for word in words])
        return tmp_path / name

    return run


def lines_of(directory: Path) -> list[dict[str, object]]:
    """The log, without what a clock says."""
    lines = [json.loads(line) for line in (directory / train.LOG_FILE).read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def test_records_are_whole_canvases_and_the_same_again(denoiser_engine: Path, records: Path) -> None:
    written = read_records(records)
    assert sorted(record.group for record in written) == ["longer", "short", "x"]
    for record in written:
        assert len(record.canvases) == len(record.steps) >= 1
        assert all(len(canvas) == CANVAS for canvas in record.canvases)
        assert all(1 <= count <= 24 for count in record.steps)
    with Distiller(denoiser_engine, slots=1) as alone:
        again = list(alone.records(PROMPTS, seed=0))
    assert {record.group: record for record in again} == {record.group: record for record in written}


def test_two_runs_end_with_the_same_weights(run: Trainer) -> None:
    first, second = run("first"), run("second")
    assert (first / WEIGHTS_FILE).read_bytes() == (second / WEIGHTS_FILE).read_bytes()
    assert lines_of(first) == lines_of(second)


def test_a_resumed_run_ends_as_one_that_was_not_interrupted(run: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run("whole")
    update = train.Run.update

    def interrupted(self: train.Run, step: int, examples: list[train.Example]) -> dict[str, float]:
        if step == 3:
            self.save(3)
            raise KeyboardInterrupt
        return update(self, step, examples)

    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run("parts")
    parts = run("parts", "--resume")
    assert (whole / WEIGHTS_FILE).read_bytes() == (parts / WEIGHTS_FILE).read_bytes()
    assert [line["first_step"] for line in lines_of(parts) if "first_step" in line] == [0, 3]


def test_it_learns_what_the_denoiser_commits(run: Trainer, denoiser: Path) -> None:
    output = run("long", steps=60)
    steps = [line for line in lines_of(output) if "loss" in line]
    start, end = float(str(steps[0]["loss"])), float(str(steps[-1]["loss"]))
    assert start > 0.7 * math.log(211)
    assert end < 0.75 * start
    opened = Checkpoint(denoiser)
    assert DrafterCheckpoint(output, opened.config, opened.sha256()).config.reads == (1, 2)


def test_sizes_that_do_not_fit_the_denoiser_are_refused(run: Trainer) -> None:
    with pytest.raises(CheckpointError, match=r"reads is \[1, 2, 9\], expected layers of the denoiser, which has 4"):
        run("bad", "9")


@pytest.mark.parametrize("line", ["{", "[]", '{"text": "x"}'])
def test_a_line_that_is_no_prompt_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"text_input": "x"}\n' + line + "\n")
    with pytest.raises(ConfigurationError, match="line 2 has no text_input"):
        list(read_prompts(path))


@pytest.mark.parametrize("line", ["{", '{"group": "x"}'])
def test_a_line_that_is_no_record_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps(Record("x", [1], [[2]], [3]).__dict__) + "\n" + line + "\n")
    with pytest.raises(ConfigurationError, match="line 2 is no record"):
        read_records(path)


def test_records_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"nowhere\.jsonl: not found"):
        read_records(tmp_path / "nowhere.jsonl")


def test_a_prompt_that_is_too_long_is_named(denoiser_engine: Path) -> None:
    with Distiller(denoiser_engine, slots=1) as distiller, pytest.raises(ConfigurationError, match="leave it out"):
        list(distiller.records([Prompt("long", "x " * 4000)], seed=0))
