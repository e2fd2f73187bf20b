"""The front end as a process, for what measures or tests it. Knows its command and one line that it prints."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

_SERVING = re.compile(r"dgemma-openai: serving on (\S+)")
_START_S, _STOP_S, _POLL_S = 30.0, 20.0, 0.02


@dataclass
class FrontEnd:
    """A running one; `log` is what it has printed so far, line by line."""

    process: subprocess.Popen[str]
    url: str = ""  # http://127.0.0.1:PORT
    log: list[str] = field(default_factory=list)


@contextlib.contextmanager
def running_front_end(triton: str, *options: str) -> Iterator[FrontEnd]:
    """`dgemma-openai serve` on a free port before the Triton at `triton` (gRPC); stopped by SIGTERM at the end."""
    command = [sys.executable, "-m", "dgemma_openai", "serve", "--port", "0", "--triton", triton, *options]
    front = FrontEnd(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    reader = threading.Thread(target=_read, args=(front,), daemon=True)
    reader.start()
    try:
        end = time.monotonic() + _START_S
        while not front.url:
            if front.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the front end did not start: {_tail(front.log)}")
            time.sleep(_POLL_S)
        yield front
    finally:
        front.process.send_signal(signal.SIGTERM)
        try:
            front.process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            front.process.kill()
            front.process.wait()
        reader.join()


def _read(front: FrontEnd) -> None:
    assert front.process.stderr is not None
    with front.process.stderr as lines:
        for line in lines:
            front.log.append(line.rstrip("\n"))
            if found := _SERVING.search(line):
                front.url = found[1]


def _tail(lines: Sequence[str]) -> str:
    return "\n".join(lines[-20:])
