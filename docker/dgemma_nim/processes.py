"""Child processes of a container's first process: started, signalled, reaped. Knows nothing of what they do.

As process 1 it also collects the ends of processes that others have left behind.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from typing import IO

from dgemma_nim.log import Log


class Child:
    """One process in a session of its own, so that a terminal's Ctrl-C reaches it only through `signal`."""

    def __init__(self, name: str, process: subprocess.Popen[bytes]) -> None:
        self.name, self.pid = name, process.pid
        self._process = process
        self.relay: threading.Thread | None = None
        self.status: int | None = None  # negative for a signal; None while it runs

    def signal(self, number: int) -> None:
        if self.status is None:  # not reaped yet, so the pid is still its own
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def ended(self, status: int) -> None:
        self.status = self._process.returncode = status


class Processes:
    """All children. `reap` has to be called again and again; nothing else waits for a process."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._children: dict[int, Child] = {}

    def start(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> Child:
        """Raises OSError where the command does not start."""
        stderr = subprocess.PIPE if self._log.wraps_children else None
        process = subprocess.Popen(
            list(command), env=dict(environment), stdin=subprocess.DEVNULL, stderr=stderr, start_new_session=True
        )
        child = self._children[process.pid] = Child(name, process)
        if process.stderr is not None:
            child.relay = threading.Thread(target=self._pump, args=(process.stderr, name), daemon=True)
            child.relay.start()
        return child

    def reap(self) -> None:
        """Note every child that has ended, and forget processes that are nobody's."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if (child := self._children.pop(pid, None)) is not None:
                child.ended(os.waitstatus_to_exitcode(status))
                if child.relay is not None:
                    child.relay.join(1.0)  # its last words; a process of its own may hold the pipe open

    def kill_all(self) -> None:
        for child in list(self._children.values()):
            child.signal(signal.SIGKILL)

    def _pump(self, stream: IO[bytes], name: str) -> None:
        with stream:
            for line in stream:
                self._log.relay(line.decode(errors="replace").rstrip("\n"), name)
