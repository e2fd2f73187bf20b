"""The command `plan`: tables, JSON, picture, and errors that name the option."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import typer
from typer.testing import CliRunner, Result

from dgemma_build.plan.cards import CARDS
from dgemma_build.plan.command import plan_command
from dgemma_runtime.errors import ConfigurationError

app = typer.Typer()
app.command("plan")(plan_command)


def plan(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "140"}).invoke(app, arguments)


def plan_json(*arguments: str) -> dict[str, Any]:
    result = plan(*arguments, "--json")
    assert result.exit_code == 0, result.output
    parsed: dict[str, Any] = json.loads(result.stdout)
    return parsed


def refused(*arguments: str) -> str:
    result = plan(*arguments)
    assert isinstance(result.exception, ConfigurationError)
    return str(result.exception)


def test_tables_show_every_gpu_and_what_does_not_fit() -> None:
    result = plan()
    assert result.exit_code == 0, result.output
    assert max(map(len, result.output.splitlines())) <= 140
    for card in CARDS.values():
        assert card.title in result.output
    assert "DiffusionGemma 26B-A4B: 25.25 B weights" in result.output
    assert "20,480" in result.output
    assert re.search(r"18 GB budget +bf16 +8k +\d+\.\d GB +--precision int4", result.output)


def test_tables_show_one_gpu_of_given_numbers() -> None:
    result = plan("--memory-gb", "48", "--bandwidth-gbs", "900", "--tflops", "180", "--precision", "fp8")
    assert result.exit_code == 0, result.output
    assert "48 GB, 900 GB/s, 180 TFLOPS" in result.output
    assert "H100" not in result.output
    assert "does not fit" not in result.output


def test_json_has_what_the_tables_have() -> None:
    report = plan_json("--gpu", "h100-80", "--gpu", "rtx4090-24", "--precision", "fp8", "--precision", "int4")
    assert report["model"]["name"] == "DiffusionGemma 26B-A4B"
    assert [(item["gpu"]["name"], item["options"]["precision"]) for item in report["plans"]] == [
        ("h100-80", "fp8"),
        ("h100-80", "int4"),
        ("rtx4090-24", "fp8"),
        ("rtx4090-24", "int4"),
    ]
    fits, short = report["plans"][0], report["plans"][2]
    assert fits["kv_bytes_per_token"] == {"full": 20_480, "sliding": 204_800}
    assert sum(fits["weights_bytes_by_part"].values()) == fits["weights_bytes"]
    assert [item["context"] for item in fits["contexts"]] == [8192, 65_536, 262_144]
    assert fits["contexts"][0]["step_floor_one_canvas"]["bound"] == "bytes"
    counts = [item["sequences"] for item in fits["contexts"]]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] >= 1
    for item in fits["contexts"]:
        assert item["step_floor_all_that_fit"]["canvases"] == item["sequences"]
        for sizes in (item["runtime_bytes"], item["scratch_bytes"]):
            assert min(sizes.values()) >= 0 < sizes["total"] <= fits["gpu"]["memory_bytes"]
        assert 0 < item["kv_bytes_per_sequence"] * item["sequences"] < item["runtime_bytes"]["total"]
    first = short["contexts"][0]
    assert not first["fits"]
    assert first["missing_bytes"] > 0
    assert "--precision int4" in first["remedies"]
    assert first["step_floor_all_that_fit"] is None


def test_a_checkpoint_is_planned_from_its_config(odd_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((odd_checkpoint / "config.json").read_text())
    arguments = ("--checkpoint", str(tmp_path), "--gpu", "budget-18", "--precision", "fp32")
    assert re.search(rf"{tmp_path.name}: \d+\.\d\d M weights", plan(*arguments).output)
    report = plan_json(*arguments)
    assert report["model"]["max_position_embeddings"] == 4096
    assert [item["context"] for item in report["plans"][0]["contexts"]] == [4096]
    assert report["plans"][0]["options"]["kv_precision"] == "fp32"


def test_options_reach_the_plan() -> None:
    bare = ("--gpu", "budget-18", "--precision", "int4", "--max-model-len", "8192")
    usual = plan_json(*bare)["plans"][0]
    small = plan_json(*bare, "--kv-precision", "fp8", "--plugins", "--reserve-gb", "0")["plans"][0]
    assert small["kv_bytes_per_token"]["sliding"] * 2 == usual["kv_bytes_per_token"]["sliding"]
    assert small["reserve_bytes"] == 0
    scratch = [item["contexts"][0]["scratch_bytes"]["experts"] for item in (small, usual)]
    assert scratch[0] < scratch[1]
    assert small["contexts"][0]["sequences"] > usual["contexts"][0]["sequences"]
    coarse = plan_json(*bare, "--int4-group-size", "64", "--max-batch-size", "1")["plans"][0]
    assert coarse["weights_bytes"] < usual["weights_bytes"]
    assert coarse["contexts"][0]["sequences"] == 1


def test_the_picture_says_what_fits_and_is_the_same_each_time(tmp_path: Path) -> None:
    files = [tmp_path / "one.svg", tmp_path / "two.svg"]
    for file in files:
        assert plan("--gpu", "h100-80", "--gpu", "rtx4090-24", "--picture", str(file)).exit_code == 0
    assert files[0].read_bytes() == files[1].read_bytes()
    ElementTree.parse(files[0])
    text = files[0].read_text()
    for words in ("H100 SXM 80 GB", "RTX 4090 24 GB", "GB short", "keys and values"):
        assert words in text


def test_a_picture_without_matplotlib_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "extra `bench`" in refused("--picture", str(tmp_path / "plan.svg"))


def test_a_picture_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    assert "cannot be written" in refused("--gpu", "h100-80", "--picture", str(tmp_path / "missing" / "plan.svg"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--gpu", "a100"), "--gpu a100: not known"),
        (("--precision", "int3"), "--precision int3: choose one of"),
        (("--memory-gb", "24"), "--bandwidth-gbs: missing"),
        (("--max-model-len", "262145"), "--max-model-len 262145"),
    ],
)
def test_wrong_options_are_refused_by_name(arguments: tuple[str, ...], words: str) -> None:
    assert words in refused(*arguments)


def test_cpu_shows_the_peak_by_use() -> None:
    result = plan("--cpu", "--max-batch-size", "1", "--max-model-len", "8192")
    assert result.exit_code == 0, result.output
    for precision in ("fp32", "int8", "int4"):
        assert re.search(rf"^{precision} +8k( +\d+\.\d\d){{7}}", result.output, re.MULTILINE)


def test_cpu_json_adds_up() -> None:
    report = plan_json("--cpu", "--precision", "int4", "--max-model-len", "65536")
    assert report["sequences"] == 8
    assert [item["context"] for item in report["cpu"]] == [8192, 65_536]
    for item in report["cpu"]:
        sizes = {name: value for name, value in item.items() if name not in ("precision", "context", "peak")}
        assert item["peak"] == sum(sizes.values())


@pytest.mark.parametrize("option", [("--gpu", "h100-80"), ("--picture", "x.svg"), ("--memory-gb", "3")])
def test_cpu_refuses_what_is_about_gpus(option: tuple[str, str]) -> None:
    assert f"{option[0]}: says nothing of a CPU" in refused("--cpu", *option)


def test_a_drafter_is_planned_beside_the_model() -> None:
    found = plan_json("--gpu", "h100-80", "--precision", "bf16", "--precision", "int4")
    drafter = found["drafter"]
    assert drafter["reads"] == [22, 23, 28, 29]
    assert (drafter["vocab_size"], drafter["canvas_length"]) == (262_144, 256)
    assert 50e6 < drafter["weights"] < 500e6
    assert drafter["embedding_weights"] == 262_144 * 2816
    for one in found["plans"]:
        draft, step = one["draft_floor_one_canvas"], one["contexts"][0]["step_floor_one_canvas"]
        assert one["drafter_bytes"] == 2 * (drafter["weights"] + drafter["embedding_weights"])
        assert 0 < draft["ms"] < step["ms"] / 3
    table = plan("--gpu", "h100-80").output
    assert re.search(r"A drafter of \d+\.\d+ [BM] weights over layers 22, 23, 28, 29", table)
