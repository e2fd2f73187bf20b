"""The first process of a container: front end at once, then the engine, then Triton; ends them in the right order.

    starting   the front end answers that it lives, and is not ready; `prepare.py` fetches and builds
    serving    Triton runs; whichever process ends first ends the container
    stopping   the front end drains first, because what runs in Triton is its requests; then Triton

Knows processes and their ends, no request and no engine.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from dgemma_nim.commands import Programs, front_end_command, server_command
from dgemma_nim.configuration import Configuration
from dgemma_nim.log import Log
from dgemma_nim.processes import Child, Processes

_POLL_S = 0.05
_MARGIN_S = 10.0  # beyond what a process has for draining, until it is killed
_AT_ONCE_S = 5.0  # after a second signal
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Plan:
    """What to run. `prepare` writes the engine that it found to `result`."""

    prepare: Sequence[str]
    result: Path
    programs: Programs
    environment: Mapping[str, str]  # of `prepare`, which may hold tokens
    child_environment: Mapping[str, str]  # of the servers


class Supervisor:
    """One container from its start to its end."""

    def __init__(self, configuration: Configuration, plan: Plan, log: Log) -> None:
        self._configuration, self._plan, self._log = configuration, plan, log
        self._processes = Processes(log)
        self._stops = 0  # signals received
        self._front_end: Child | None = None
        self._prepare: Child | None = None
        self._server: Child | None = None

    def run(self) -> int:
        """The exit status: 0 after a requested stop or a finished download, 1 where something failed."""
        for number in _SIGNALS:
            signal.signal(number, self._on_signal)
        try:
            status = self._serve()
            return max(status, self._stop())
        except OSError as error:
            self._log.say(f"error: {error}", "ERROR")
            self._stop()
            return 1
        finally:
            self._processes.kill_all()

    # ------------------------------------------------------------ up

    def _serve(self) -> int:
        only_prepare = self._configuration.download_only
        if not only_prepare:
            command = front_end_command(self._plan.programs.front_end, self._configuration)
            self._front_end = self._start("dgemma-openai", command)
        self._prepare = self._processes.start("prepare", self._plan.prepare, self._plan.environment)
        while self._prepare.status is None:
            if self._wait():
                return self._first_end((self._front_end,))
        if self._prepare.status != 0:
            return self._failed(f"preparing the engine {_ended(self._prepare.status)}")
        if only_prepare:
            self._log.say("the engine is there; nothing is served, as NIM_ENGINE_MODEL_DOWNLOAD_ONLY says")
            return 0
        found = json.loads(self._plan.result.read_text())
        settled = replace(self._configuration, max_model_len=found["max_model_len"])
        command = server_command(self._plan.programs.server, settled, Path(found["engine"]))
        self._server = self._start("dgemma-server", command)
        while not self._wait():
            pass
        return self._first_end((self._front_end, self._server))

    def _start(self, name: str, command: Sequence[str]) -> Child:
        self._log.say("starting " + " ".join(command))
        return self._processes.start(name, command, self._plan.child_environment)

    def _wait(self) -> bool:
        """One look; whether it is time to stop: a signal came, or a server ended."""
        time.sleep(_POLL_S)
        self._processes.reap()
        servers = (self._front_end, self._server)
        return self._stops > 0 or any(child is not None and child.status is not None for child in servers)

    def _first_end(self, servers: tuple[Child | None, ...]) -> int:
        for child in servers:
            if child is not None and child.status is not None and not self._stops:
                return self._failed(f"{child.name} {_ended(child.status)}; the container stops")
        return 0

    def _failed(self, text: str) -> int:
        self._log.say(f"error: {text}", "ERROR")
        return 1

    # ------------------------------------------------------------ down

    def _stop(self) -> int:
        """Everything, in order; 1 where a process did not end as it was asked to."""
        worst = 0
        grace_s = self._configuration.drain_s + _MARGIN_S
        for child, patience_s in ((self._prepare, _MARGIN_S), (self._front_end, grace_s), (self._server, grace_s)):
            if child is None or child.status is not None:
                continue
            child.signal(signal.SIGTERM)
            self._wait_for_end(child, patience_s)
            if child is not self._prepare and child.status not in (0, -signal.SIGTERM) and self._stops < 2:
                self._log.say(f"error: {child.name} {_ended(child.status)} when it was to stop", "ERROR")
                worst = 1
        if self._stops:
            self._log.say("stopped")
        return worst

    def _wait_for_end(self, child: Child, patience_s: float) -> None:
        """Kills what takes longer; after a second signal that is soon, and Triton is told that nobody waits."""
        end = time.monotonic() + patience_s
        hurried = False
        while child.status is None:
            if self._stops > 1 and not hurried:
                hurried, end = True, min(end, time.monotonic() + _AT_ONCE_S)
                child.signal(signal.SIGTERM)
            if time.monotonic() > end:
                child.signal(signal.SIGKILL)
            time.sleep(_POLL_S)
            self._processes.reap()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stops += 1
        if self._stops == 1:
            self._log.say("stopping: running requests may end (again to stop at once)")


def _ended(status: int | None) -> str:
    if status is not None and status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    return f"ended with status {status}"
