"""The command `dgemma-server` in a process of its own: its lines on stderr, its signals, its exit status."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from dgemma_runtime.server_process import model_processes

if TYPE_CHECKING:
    from tests.server.conftest import Addresses, Caller, Command


@pytest.fixture
def run(command: Callable[..., Command]) -> Iterator[Callable[..., Command]]:
    """`command`, ended with each test."""
    started: list[Command] = []

    def start(*arguments: str, **options: Path) -> Command:
        started.append(command(*arguments, **options))
        return started[-1]

    yield start
    for each in started:
        each.process.terminate()
        each.end()


def kill_model(server: Addresses) -> None:
    os.kill(next(model_processes(server.pid)), signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_says_where_it_is_and_stops_when_told_to(
    run: Callable[..., Command], call: type[Caller], number: signal.Signals
) -> None:
    command = run()
    server = command.ready()
    assert call(server).ready()
    command.process.send_signal(number)
    assert command.end() == 0
    assert command.lines[-1] == "dgemma-server: stopped"
    with pytest.raises(ProcessLookupError):
        os.kill(server.pid, 0)


def test_a_second_signal_stops_it_at_once(run: Callable[..., Command], call: type[Caller]) -> None:
    command = run()
    with call(command.ready()).stream(text_input="forever", stream=True) as stream:
        stream.next()
        command.process.send_signal(signal.SIGINT)
        command.wait_for("stopping: running requests may end")
        started = time.monotonic()
        command.process.send_signal(signal.SIGINT)
        assert command.end() == 0
    assert time.monotonic() - started < 5


def test_a_signal_during_the_start(run: Callable[..., Command]) -> None:
    command = run("--verbose")
    command.wait_for("loading: diffusion_gemma:1|Failed to")
    command.process.send_signal(signal.SIGTERM)
    assert command.end() == 0


def test_without_restarts_a_failure_ends_it(run: Callable[..., Command], call: type[Caller]) -> None:
    command = run("--restarts", "0")
    assert call(command.ready()).infer(text_input="fail").error is not None
    assert command.end() == 1
    failed = "dgemma-server: error: the engine failed: scripted failure; no restart is allowed (--restarts 0)"
    assert command.lines[-1] == failed


def test_it_gives_up_after_repeated_failures(run: Callable[..., Command]) -> None:
    command = run("--restarts", "1")
    kill_model(command.ready())
    kill_model(command.ready(2))
    assert command.end() == 1
    said = [line for line in command.lines if "error" in line]
    crashed = "dgemma-server: error: the model's process has crashed; "
    assert said == [
        crashed + "starting the server again (restart 1 of 1)",
        crashed + "given up after 1 restarts without 300 s of service",
    ]


def test_a_signal_while_it_is_restarted(run: Callable[..., Command]) -> None:
    command = run()
    kill_model(command.ready())
    command.wait_for("starting the server again")
    command.process.send_signal(signal.SIGTERM)
    assert command.end() == 0
    assert command.lines[-1] == "dgemma-server: stopped"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--http-port", "70000"], "http_port must be from 0 to 65535"),
        (["--max-model-len", "5000"], "max_model_len is 5000, the engine was built for 4096 tokens"),
        (["--max-batch-size", "0"], "max_batch_size must be an integer of at least 1, got 0"),
        (["--restarts", "-1"], "restarts must be at least 0, got -1"),
        (["--restart-window", "0"], "restart_window must be above 0 seconds, got 0"),
        (["--step-timeout", "0"], "step_timeout_s must be a number of seconds above 0, got 0"),
        (["--model-repository", "/nonexistent"], "/nonexistent: no model repository"),
    ],
)
def test_what_is_wrong_is_one_line(run: Callable[..., Command], arguments: list[str], message: str) -> None:
    command = run(*arguments)
    assert command.end() == 1
    (line,) = command.lines
    assert line.startswith("dgemma-server: error: ")
    assert message in line


def test_no_engine_is_one_line(run: Callable[..., Command], tmp_path: Path) -> None:
    command = run(directory=tmp_path)
    assert command.end() == 1
    (line,) = command.lines
    assert line.startswith(f"dgemma-server: error: {tmp_path}/config.json: not found; build the engine again")


def test_a_load_that_fails_is_an_error(
    run: Callable[..., Command], make_engine: Callable[..., Path], tmp_path: Path
) -> None:
    command = run(directory=make_engine(tmp_path / "engine", failing_prompt=[0]))
    assert command.end() == 1
    assert command.lines[-1].startswith(
        "dgemma-server: error: the Triton server ended with status 1 before it was ready: the warm-up generation failed"
    )
