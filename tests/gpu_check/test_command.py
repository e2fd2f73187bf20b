"""What the command says where it cannot run, what it needs, and its exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dgemma_build.gpu_check import command, rtx
from dgemma_build.gpu_check.report import Report
from dgemma_build.gpu_check.results import Card, Row

ROOT = Path(__file__).resolve().parents[2]
CARD = Card(copy=2e12, read=3e12, bf16_flops=7e14, fp8_flops=1.4e15, launch_ms=0.004)


def run(*arguments: str, blocked: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """The command as on a machine with a GPU's software alone: `blocked` packages cannot be imported."""
    start = (
        f"import sys\nfor name in {blocked!r}: sys.modules[name] = None\n"
        f"sys.argv = ['gpu_check', *{arguments!r}]\n"
        "import runpy; runpy.run_module('dgemma_build.gpu_check', run_name='__main__')\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": "build:python_backend"}
    return subprocess.run([sys.executable, "-c", start], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_without_a_gpu_one_line_says_so_and_nothing_but_torch_and_triton_is_imported() -> None:
    others = (
        "onnx",
        "onnxruntime",
        "safetensors",
        "ml_dtypes",
        "rich",
        "tokenizers",
        "transformers",
        "typer",
        "psutil",
    )
    result = run("--quick", blocked=others)
    assert result.returncode == 2
    assert result.stdout == ""
    (said,) = result.stderr.splitlines()
    assert said.startswith("gpu-check: torch ")
    assert "CUDA" in said


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_what_is_not_installed_is_named(name: str) -> None:
    result = run(blocked=(name,))
    assert result.returncode == 2
    (said,) = result.stderr.splitlines()
    assert f"{name} is not installed" in said


def test_layers_must_be_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(["--layers", "0"])
    assert ended.value.code == 2
    assert "--layers 0: must be at least 1" in capsys.readouterr().err


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A check that finds the rows given here; what it was asked for is left here too."""
    asked: dict[str, Any] = {"rows": [Row("fast")]}

    def check(machine: Any, sizes: Any, scope: Any, only: str, output: Path | None) -> Report:
        asked.update(scope=scope, output=output)
        return Report({"device": "d", "commit": "c", "date": "t"}, CARD, {}, asked["rows"], complete=True)

    monkeypatch.setattr(command, "what_is_missing", lambda: "")
    monkeypatch.setattr(command, "CudaMachine", SimpleNamespace)
    monkeypatch.setattr(command, "check", check)
    return asked


def test_only_a_whole_run_replaces_the_figures(checked: dict[str, Any]) -> None:
    assert command.main([]) == 0
    assert checked["output"] == ROOT / "benchmarks" / "gpu_check.json"
    for part in (["--quick"], ["--only", "head"], ["--layers", "2"]):
        assert command.main(part) == 0
        assert checked["output"] is None
    assert checked["scope"].layers == 2
    assert command.main(["--quick", "--output", "here.json"]) == 0
    assert checked["output"] == Path("here.json")


def test_the_last_line_is_json_and_wrong_numbers_are_the_exit_status(
    checked: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    checked["rows"] = [Row("broken", error="RuntimeError: no")]
    assert command.main([]) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["failed"] == ["broken"]


def test_no_row_of_that_name(checked: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    checked["rows"] = []
    with pytest.raises(SystemExit) as ended:
        command.main(["--only", "tail"])
    assert ended.value.code == 2
    assert "--only tail: no row" in capsys.readouterr().err


def test_tensorrt_rtx_without_a_gpu_answers_and_does_not_end_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = rtx.try_in_own_process()
    assert found["answer"] == "does not run"
    assert found["reason"]


def test_tensorrt_rtx_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rtx, "find_spec", lambda name: None)
    assert rtx.try_in_own_process() == {"answer": "not installed"}


@pytest.mark.parametrize(
    ("script", "reason"),
    [("import sys; sys.exit('no driver')", "exit status 1: no driver"), ("", "exit status 0: nothing was said")],
)
def test_a_process_that_ends_without_an_answer(monkeypatch: pytest.MonkeyPatch, script: str, reason: str) -> None:
    real = subprocess.run

    def other(command_line: list[str], **options: Any) -> Any:
        return real([sys.executable, "-c", script], **options)

    monkeypatch.setattr("subprocess.run", other)
    assert rtx.try_in_own_process() == {"answer": "does not run", "reason": reason}
