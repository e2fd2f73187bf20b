"""The container's commands: what they print, and how they fail."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.nim.conftest import DEMO as DEMO_DIRECTORY

from dgemma_nim import cli
from dgemma_nim.profiles import Profile

DEMO = str(DEMO_DIRECTORY)


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of NIM, whatever this machine has set."""
    import os

    for name in list(os.environ):
        if name.startswith(("NIM_", "DGEMMA_", "NGC_", "HF_")):
            monkeypatch.delenv(name)


def test_a_dry_run_shows_settings_origins_and_commands(
    demo: Path, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NIM_MODEL_PATH", str(demo))
    monkeypatch.setenv("NIM_CACHE_PATH", str(cache))
    monkeypatch.setenv("NGC_API_KEY", "nvapi-secret")
    assert cli.run("nim-serve", ["--dry-run", "--port", "9000", "--profile", "onnxruntime-int8-cpu-4096"]) == 0
    shown, said = capsys.readouterr()
    rows = {line.split()[0]: line.split()[1:] for line in shown.splitlines() if line[:1].isalpha() and ":" not in line}
    assert rows["server_port"] == ["9000", "command", "line"]
    assert rows["max_model_len"] == ["4096", "profile"]
    assert rows["model_profile"] == ["onnxruntime-int8-cpu-4096", "command", "line"]
    for word in ("dgemma-openai serve", "dgemma-build engine", "--precision int8", "dgemma-server run"):
        assert word in shown
    assert "nvapi-secret" not in shown + said
    assert list(cache.iterdir()) == []


def test_a_dry_run_as_json(demo: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--dry-run", "--json", "--model", str(demo), "--cache-path", str(cache)]
    assert cli.run("nim-serve", words) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["settings"]["max_model_len"] == {"value": 262144, "from": "profile"}
    assert found["settings"]["model_profile"]["from"] == "chosen for this machine"
    assert set(found["commands"]) == {"front_end", "build", "server"}


def test_a_dry_run_of_what_was_not_fetched_yet(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--dry-run", "--json", "--model", "hf://a/b", "--cache-path", str(cache), "--no-download"]
    assert cli.run("nim-serve", words) == 0
    assert json.loads(capsys.readouterr().out)["commands"]["build"][0] == "(after a download)"


def test_profiles_are_listed_by_what_runs(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run("list-model-profiles", ["--model", str(demo), "--max-model-len", "4096"]) == 0
    shown = capsys.readouterr().out
    first, *_ = shown.split("- Compatible with system but low memory:")
    profile = Profile("onnxruntime", "fp32", "cpu", 4096)
    assert f"  - {profile.id} ({profile.tag}) [requires >=" in first
    assert "- Incompatible with system:\n" in shown
    assert "tensorrt-fp8-h100-4096" in shown


def test_profiles_as_json_of_the_released_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run("list-model-profiles", ["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    profiles = {each["tag"]: each for each in found["profiles"]}
    assert profiles["onnxruntime-fp32-cpu-262144"]["needs_bytes"] > 100e9
    assert {each["state"] for each in profiles.values()} <= {"runnable", "low_memory", "incompatible"}
    assert found["system"]["memory_bytes"] > 0


def test_a_store_is_an_engine_that_can_be_served(demo: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--profile", "onnxruntime-int8-cpu-4096", "--model-store", str(tmp_path / "store"), "--model", str(demo)]
    assert cli.run("create-model-store", words) == 0
    assert cli.run("nim-serve", ["--dry-run", "--json", "--model", str(tmp_path / "store")]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["settings"]["max_model_len"] == {"value": 4096, "from": "engine"}
    assert found["commands"]["build"] == []


def test_a_model_on_disk_needs_no_download(
    demo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NIM_DRAFT_MODEL_PATH", "/nowhere")  # which this command does not use
    assert cli.run("download-to-cache", ["--all", "--model", str(demo)]) == 0
    assert "nothing to fetch" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("nim-serve", ["--dry-run"], ["NIM_MODEL_PATH"]),
        ("nim-serve", [], ["NIM_MODEL_PATH"]),
        ("nim-serve", ["--model", "/nowhere"], ["/nowhere", "mount"]),
        ("nim-serve", ["--model", DEMO, "--draft-model", "/nowhere"], ["NIM_DRAFT_MODEL_PATH is '/nowhere'", "mount"]),
        ("nim-serve", ["--model", DEMO, "--draft-model", DEMO], ["demo/config.json", "dgemma-build engine --drafter"]),
        ("nim-serve", ["--prot", "1"], ["--prot", "no such option"]),
        ("create-model-store", [], ["--model-store"]),
        ("create-model-store", ["--model-store", "/proc"], ["/proc", "mount"]),
        ("download-to-cache", ["--model", "ngc://a/b"], ["ngc://a/b"]),
        ("list-model-profiles", ["--max-model-len", "x"], ["--max-model-len", "'x'"]),
    ],
)
def test_errors_are_one_line_and_status_2(
    name: str,
    arguments: list[str],
    words: list[str],
    cache: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NIM_CACHE_PATH", str(cache))
    assert cli.run(name, arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{name}: error: ")
    assert all(word in line for word in words), line


def test_errors_are_objects_where_logs_are(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIM_JSONL_LOGGING", "1")
    monkeypatch.setenv("NIM_SERVER_PORT", "none")
    assert cli.run("nim-serve", []) == 2
    assert json.loads(capsys.readouterr().err)["level"] == "ERROR"


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.run(name, ["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: {name}")
    assert "--max-model-len" in shown


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--dry-run", "--port", "0"], 2, "nim-serve: error: --port"),
        (["nim-serve", "--port", "0"], 2, "nim-serve: error: --port"),
        (["bash"], 2, "'bash' is no command"),
    ],
)
def test_the_entry_point_takes_a_command_or_flags(words: list[str], status: int, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dgemma_nim.cli", *words], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, said in done.stderr) == (status, True), done.stderr
