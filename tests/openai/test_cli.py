"""The command: its options reach the settings, its errors are one line, its keys fit."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dgemma_openai import cli
from dgemma_openai.settings import Settings, read_api_keys

run = CliRunner().invoke


@pytest.fixture(autouse=True)
def _loggers() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("dgemma_openai", "uvicorn", "uvicorn.error")]
    before = [(logger.handlers, logger.propagate, logger.level) for logger in loggers]
    yield
    for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate, logger.level = handlers, propagate, level


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """The settings with which the server would have been started."""
    found: list[Settings] = []

    def serve(settings: Settings) -> int:
        found.append(settings)
        return 0

    monkeypatch.setattr(cli, "run_server", serve)
    return found


def test_without_options_the_settings_are_the_default(started: list[Settings]) -> None:
    assert run(cli.app, ["serve"]).exit_code == 0
    assert started == [Settings()]


def test_every_option_reaches_its_setting(started: list[Settings], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text(f"{'0' * 64} ann")
    options = {
        "host": "0.0.0.0",
        "port": 9000,
        "health_port": 9001,
        "triton": "t:1",
        "triton_metrics": "http://t:2/metrics",
        "model": "m",
        "tls_certificate": file,
        "tls_key": file,
        "tls_client_ca": file,
        "max_body_bytes": 10,
        "max_choices": 3,
        "requests_per_minute": 4,
        "timeout_s": 5.0,
        "drain_s": 6.0,
    }
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    arguments += ["--served-model-name=a", "--served-model-name=b", "--cors-origin=http://x", "--cors-origin=http://y"]
    arguments += [f"--api-key-hashes={file}", "--log-prompts", "--no-playground", "--log-level=DEBUG"]
    result = run(cli.app, ["serve", *arguments])
    assert result.exit_code == 0, result.stderr
    assert started == [
        Settings(
            **options,  # type: ignore[arg-type]  # their types are those of the settings
            served_model_names=("a", "b"),
            cors_origins=("http://x", "http://y"),
            api_keys=read_api_keys(file),
            log_prompts=True,
            playground=False,
        )
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--log-level=LOUD"], "log_level: must be one of DEBUG, INFO, WARNING, ERROR, got 'LOUD'"),
        (["--log-format=xml"], "log_format: must be one of text, json, got 'xml'"),
        (["--max-choices=0"], "max_choices: must be at least 1, got 0"),
        (["--tls-key=/nonexistent"], "tls_key: /nonexistent is not a file"),
        (["--api-key-hashes=/nonexistent"], "api_key_hashes: /nonexistent is not readable"),
    ],
)
def test_a_setting_that_cannot_be_used_is_one_line(started: list[Settings], arguments: list[str], message: str) -> None:
    result = run(cli.app, ["serve", *arguments])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"dgemma-openai: error: {message}")
    assert result.stderr.count("\n") == 1
    assert started == []


def test_a_key_is_made_and_shown_once(tmp_path: Path) -> None:
    result = run(cli.app, ["hash-key", "ann"])
    key = result.stderr.removeprefix("key, shown only now: ").strip()
    file = tmp_path / "keys"
    file.write_text(result.stdout)
    [found] = read_api_keys(file)
    assert found.name == "ann"
    assert found.sha256 == hashlib.sha256(key.encode()).digest()
    assert key not in result.stdout
    assert len(key) > 40


def test_two_keys_differ() -> None:
    assert run(cli.app, ["hash-key"]).stdout != run(cli.app, ["hash-key"]).stdout


def test_a_key_of_one_s_own_is_only_hashed() -> None:
    result = run(cli.app, ["hash-key", "--key", "sk-mine"])
    assert result.stdout == hashlib.sha256(b"sk-mine").hexdigest() + "\n"
    assert result.stderr == ""
