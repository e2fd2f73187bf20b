"""A contender in a process of its own, so that memory and thread pools do not mix: JSON lines in, JSON lines out."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

Message = dict[str, Any]


class WorkerFailed(RuntimeError):
    """The process ended or reported an error; its standard error was passed through."""


class Worker:
    """Parent's side: starts `python -m MODULE`, sends one message at a time and waits for the answer."""

    def __init__(self, module: str, threads: int, **start: Any) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        self._module = module
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,  # as the server is: Linux shares a busy machine out among sessions
        )
        self.pid = self._process.pid
        try:
            self.ask(threads=threads, **start)
        except BaseException:
            self.close()
            raise

    def ask(self, **message: Any) -> Message:
        """The answer to `message`; raises WorkerFailed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerFailed(f"{self._module} ended with exit code {self._process.wait()}") from None
        line = self._process.stdout.readline()
        if not line:
            raise WorkerFailed(f"{self._module} ended with exit code {self._process.wait()}")
        answer: Message = json.loads(line)
        if "error" in answer:
            raise WorkerFailed(f"{self._module}: {answer['error']}")
        return answer

    def close(self) -> None:
        """End the process; it ends by itself when its input does."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def serve(start: Callable[[Message], Callable[[Message], Message]]) -> None:
    """Worker's side: the first message starts it, each further one is answered by what `start` returned.

    Whatever else the process prints goes to standard error, so that the answers stay clean.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    handle: Callable[[Message], Message] | None = None
    for line in sys.stdin:
        try:
            if handle is None:
                handle, answer = start(json.loads(line)), {}
            else:
                answer = handle(json.loads(line))
        except Exception as error:  # noqa: BLE001 - whatever it is, the parent must hear of it
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def peak_memory_bytes(pid: int | None = None) -> int:
    """Peak resident memory of a process (this one without `pid`) since it started."""
    with open(f"/proc/{'self' if pid is None else pid}/status") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    raise WorkerFailed(f"process {pid} shows no VmHWM; is it running?")
