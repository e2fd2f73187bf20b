"""Training takes the same steps again, resumed or not, and learns; records come from the denoiser itself."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from dgemma_build.checkpoint import Checkpoint
from dgemma_build.drafter import data, train
from dgemma_build.drafter.checkpoint import WEIGHTS_FILE, DrafterCheckpoint
from dgemma_build.drafter.data import Distiller, Prompt, held_out_prompts, read_prompts
from dgemma_build.drafter.records import Record, read_records
from dgemma_runtime.errors import CheckpointError, ConfigurationError

CANVAS = 12
PROMPTS = [
    Prompt("short", "Name a river"),
    Prompt("longer", "Write all the numbers from one to twelve"),
    Prompt("x", "?"),
]
Trainer = Callable[..., Path]
Reader = Callable[[Path], list[Record]]


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
def read(denoiser: Path) -> Reader:
    opened = Checkpoint(denoiser)
    return lambda path: read_records(path, opened.config.spec, opened.sha256())


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


def test_records_are_whole_canvases_and_the_same_again(denoiser_engine: Path, records: Path, read: Reader) -> None:
    written = read(records)
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


def test_only_a_run_of_the_same_kind_is_resumed(run: Trainer, records: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"training\.pt not found; leave out --resume"):
        run("run", "--resume")
    state = run("run", steps=2) / train.STATE_FILE
    more = tmp_path / "more.jsonl"
    more.write_text(2 * records.read_text())
    for words, complaint in (
        (("--batch", "16"), "with batch 8, this one has 16; give what"),
        (("--seed", "7"), "with seed 0, this one has 7"),
        (("--reads", "1", "3"), r"with reads \(1, 2\), this one has \(1, 3\)"),
        (("--data", str(more)), r"with data_sha256 '\w+', this one has '\w+'"),
        (("--steps", "1"), r"--steps 1: .* is after step 2; ask for more"),
    ):
        with pytest.raises(ConfigurationError, match=complaint):
            run("run", "--resume", *words)
    run("run", "--resume", steps=3)
    for content in (b"", b"PK", b"{}"):
        state.write_bytes(content)
        with pytest.raises(ConfigurationError, match="is no state of a training run"):
            run("run", "--resume")


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


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b"{", "Expecting property name"),
        (b"[]", "it is not a JSON object"),
        (b'{"text": "x"}', "text_input is missing"),
        (b'{"text_input": null}', "text_input is None, expected a text"),
        (b'{"text_input": "x", "group": 3}', "group is 3, expected a text"),
        (b'{"text_input": "\xff"}', "can't decode byte 0xff"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(tmp_path: Path, line: bytes, complaint: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"text_input": "x"}\n' + line + b"\n")
    with pytest.raises(ConfigurationError, match=rf"--prompts \S+: line 2 is no prompt: .*{complaint}.*; write one"):
        read_prompts(path)


def test_prompts_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"nowhere\.jsonl: not found; write one JSON object"):
        read_prompts(tmp_path / "nowhere.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ConfigurationError, match=r"empty\.jsonl: holds no prompt"):
        read_prompts(tmp_path / "empty.jsonl")


def test_the_seed_chooses_held_out_prompts() -> None:
    first, again, other = (list(held_out_prompts(2, seed)) for seed in (1, 1, 2))
    assert first == again
    assert not set(first) & set(other)


CANVASES = [[2] * CANVAS]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "Expecting property name"),
        ("3", "it is not a JSON object"),
        ({"more": 1}, "more is unknown"),
        ({"denoiser_sha256": None}, "denoiser_sha256 is missing"),
        ({"denoiser_sha256": "f" * 64}, r"denoiser_sha256 is f{12}…, the denoiser's \w{12}…"),
        ({"group": 7}, "group is 7, expected a text"),
        ({"prompt": "x"}, "prompt is 'x', expected a list of token ids"),
        ({"prompt": []}, r"prompt is \[\], expected a list of token ids"),
        ({"prompt": [1, True]}, r"prompt\[1\] is True, expected a token id from 0 to 210"),
        ({"canvases": 3}, "canvases is 3, expected a list of canvases"),
        ({"canvases": [], "steps": []}, r"canvases is \[\], expected a list of canvases"),
        ({"canvases": [*CANVASES, [2]], "steps": [1, 1]}, r"canvases\[1\] has 1 tokens, a canvas of the denoiser 12"),
        ({"canvases": [[*[2] * 11, 211]]}, r"canvases\[0\]\[11\] is 211, expected a token id from 0 to 210"),
        ({"canvases": [[*[2] * 11, -1]]}, r"canvases\[0\]\[11\] is -1, expected a token id"),
        ({"steps": [0]}, r"steps is \[0\], expected a list of whole numbers above 0"),
        ({"steps": [1, 1]}, "steps has 2 numbers for 1 canvases"),
    ],
)
def test_a_line_that_is_no_record_is_named(
    denoiser: Path, read: Reader, tmp_path: Path, line: str | dict[str, object], complaint: str
) -> None:
    good = asdict(Record("x", [1], CANVASES, [3], Checkpoint(denoiser).sha256()))
    if isinstance(line, dict):
        line = json.dumps({name: value for name, value in (good | line).items() if value is not None})
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps(good) + "\n")
    assert [asdict(record) for record in read(path)] == [good]
    path.write_text(json.dumps(good) + "\n" + line + "\n")
    with pytest.raises(ConfigurationError, match=f"line 2 is no record of this denoiser: {complaint}.*; make the file"):
        read(path)


def test_records_that_are_not_there_are_named(read: Reader, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"nowhere\.jsonl: not found"):
        read(tmp_path / "nowhere.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ConfigurationError, match=r"empty\.jsonl: holds no record"):
        read(tmp_path / "empty.jsonl")


def test_a_prompt_that_is_too_long_is_named(denoiser_engine: Path) -> None:
    with Distiller(denoiser_engine, slots=1) as distiller, pytest.raises(ConfigurationError, match="leave it out"):
        list(distiller.records([Prompt("long", "x " * 4000)], seed=0))
