"""The command `dgemma-server` in a process of its own: its lines on stderr, its signals, its exit status."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton

from dgemma_runtime.server_process import MODEL_NAME


class Command:
    """`dgemma-server run` with its stderr read line by line."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "dgemma_runtime.server", "run", *arguments]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._changed:
                self.lines.append(line.rstrip())
                self._changed.notify_all()

    def wait_for(self, pattern: str, timeout_s: float = 30.0) -> re.Match[str]:
        """The first line on stderr that matches."""

        def find() -> re.Match[str] | None:
            return next((match for line in self.lines if (match := re.search(pattern, line))), None)

        with self._changed:
            self._changed.wait_for(lambda: find() is not None, timeout_s)
            match = find()
        assert match is not None, f"no line matches {pattern}: {self.lines}"
        return match

    def end(self, timeout_s: float = 40.0) -> int:
        status = self.process.wait(timeout_s)
        self._reader.join()
        return status

    def ready(self) -> tuple[str, int]:
        """gRPC address and pid of the server."""
        match = self.wait_for(r"ready: gRPC (\S+), HTTP http://\S+, metrics http://\S+/metrics \(pid (\d+)\)")
        return match[1], int(match[2])


@pytest.fixture
def run(engine: Path) -> Iterator[Callable[..., Command]]:
    commands: list[Command] = []

    def start(*arguments: str, directory: Path = engine) -> Command:
        ports = [argument for name in ("http", "grpc", "metrics") for argument in (f"--{name}-port", "0")]
        commands.append(Command("--engine", str(directory), *ports, *arguments))
        return commands[-1]

    yield start
    for command in commands:
        command.process.terminate()
        command.end()
        assert command.process.stdout is not None
        assert command.process.stderr is not None
        command.process.stdout.close()
        command.process.stderr.close()


def stub_of(server: int) -> int:
    """The pid of the model's process."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and "python_backend_stub" in (entry / "cmdline").read_text():
                parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
                if int(parent) == server:
                    return int(entry.name)
    raise AssertionError("no model process")


def endless(url: str) -> triton.InferenceServerClient:
    """A request of many seconds, under way."""
    first = threading.Event()
    client = triton.InferenceServerClient(url)
    client.start_stream(lambda result, error: first.set())
    prompt, stream = triton.InferInput("text_input", [1], "BYTES"), triton.InferInput("stream", [1], "BOOL")
    prompt.set_data_from_numpy(np.array([b"forever"], object))
    stream.set_data_from_numpy(np.array([True]))
    client.async_stream_infer(MODEL_NAME, [prompt, stream])
    assert first.wait(10)
    return client


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_says_where_it_is_and_stops_when_told_to(run: Callable[..., Command], number: signal.Signals) -> None:
    command = run()
    url, server = command.ready()
    with contextlib.closing(triton.InferenceServerClient(url)) as client:
        assert client.is_model_ready(MODEL_NAME)
    command.process.send_signal(number)
    assert command.end() == 0
    assert command.lines[-1] == "dgemma-server: stopped"
    with pytest.raises(ProcessLookupError):
        os.kill(server, 0)


def test_a_second_signal_stops_it_at_once(run: Callable[..., Command]) -> None:
    command = run()
    url, _ = command.ready()
    with contextlib.closing(endless(url)):
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


def test_a_crash_of_the_model_s_process_ends_it(run: Callable[..., Command]) -> None:
    command = run()
    _, server = command.ready()
    os.kill(stub_of(server), signal.SIGKILL)
    command.wait_for("error: the model's process has crashed; stopping the server")
    assert command.end() == 1


def test_an_engine_failure_ends_it(run: Callable[..., Command]) -> None:
    command = run()
    url, _ = command.ready()
    with contextlib.closing(triton.InferenceServerClient(url)) as client:
        client.start_stream(lambda result, error: None)
        prompt = triton.InferInput("text_input", [1], "BYTES")
        prompt.set_data_from_numpy(np.array([b"fail"], object))
        client.async_stream_infer(MODEL_NAME, [prompt])
        command.wait_for("error: the engine has failed and the model is not ready any more")
    assert command.end() == 1
    assert any("the engine failed: scripted failure; the model was unloaded" in line for line in command.lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--http-port", "70000"], "http_port must be from 0 to 65535"),
        (["--max-model-len", "5000"], "max_model_len is 5000, the engine was built for 4096 tokens"),
        (["--max-batch-size", "0"], "max_batch_size must be an integer of at least 1, got 0"),
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
