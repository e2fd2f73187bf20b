"""What a suffix is worth: how answers are cut, and a whole small run."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from tokenizers import Tokenizer

from dgemma_build.bench import suffixes
from dgemma_build.bench.report import Environment
from dgemma_build.demo.skills import SKILLS, held_out_set
from dgemma_runtime.codec import Codec

DEMO = Path(__file__).resolve().parents[2] / "build/checkpoints/demo"


@pytest.mark.parametrize("skill", list(SKILLS))
def test_the_parts_are_the_answer(skill: str) -> None:
    codec = Codec(Tokenizer.from_file(str(DEMO / "tokenizer.json")), "<bos>")
    found = suffixes.cuts(skill, 10, codec)
    assert found[:5] == suffixes.cuts(skill, 5, codec)
    for cut, example in zip(found, held_out_set(skill, 10), strict=True):
        assert (cut.task, cut.prompt[-len(cut.beginning) :] if cut.beginning else "") == (example.prompt, cut.beginning)
        middle = example.answer.removeprefix(cut.beginning).removesuffix(cut.suffix)
        assert cut.beginning + middle + cut.suffix == example.answer
        assert 1 <= cut.hole_tokens == len(codec.encode(middle)) - 1 <= suffixes.LONGEST_HOLE
        assert len(codec.encode(cut.suffix)) - 1 >= suffixes.SHORTEST_SUFFIX
        assert cut.right(skill, middle)
        assert not cut.right(skill, middle + "!")


def test_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["suffixes", "--count", "2", "--output", str(tmp_path)])
    suffixes.main()

    document = json.loads((tmp_path / suffixes.RESULT).read_text())
    assert document == json.loads(capsys.readouterr().out)
    assert [point["skill"] for point in document["points"]] == list(SKILLS)
    for point in document["points"]:
        assert point["of"] == 2
        assert point["passes"] >= 1
        assert 0 <= point["right_without"] <= 2
    infill = document["points"][-1]
    assert infill["right_with"] == infill["right_given_length"] == 2


def test_the_table_has_shares() -> None:
    point = suffixes.SuffixPoint("json", 4, 1, 3, 2, 4.25, 4)
    console = Console(record=True, width=140, file=io.StringIO())
    console.print(suffixes.table([point], Environment("a machine", "abc", "now", 0.1, 2, {})))
    assert [cell.strip() for cell in console.export_text().splitlines()[-2].split("│")[1:-1]] == [
        *("json", "25%", "75%", "50%", "4.2", "100%"),
    ]
