"""A server of the command `dgemma-server`, with an engine that fails when told to, for the rows about faults.

Knows the command's lines and its processes; measures nothing.
"""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from dgemma_build.accept.streaming import patched_repository
from dgemma_runtime.server_process import MODEL_NAME, model_processes

_READY = re.compile(r"dgemma-server: ready: gRPC (\S+), HTTP (\S+), metrics \S+ \(pid (\d+)\)")
_START_S = 120.0
_POLL_S = 0.02

# Behind the model's own file: a denoising call that finds a word in a file does what it says, once.
_FAULTY = """

import time
from pathlib import Path

from dgemma_runtime import assembly
from dgemma_runtime.errors import EngineError

_open_engine = assembly.open_engine


def _open_faulty(*arguments):
    engine = _open_engine(*arguments)
    denoise, order = engine.denoise, Path({order!r})

    def faulty(rows, commits=()):
        if order.exists():
            what = order.read_text()
            order.unlink()
            if what == "raise":
                raise EngineError("injected fault")
            time.sleep(3600)
        return denoise(rows, commits)

    engine.denoise = faulty
    return engine


assembly.open_engine = _open_faulty
"""


@dataclass(frozen=True)
class SupervisedServer:
    """A running `dgemma-server`; addresses stay the same over restarts."""

    process: subprocess.Popen[bytes]
    grpc_url: str
    http_url: str
    log: Path
    order: Path

    @property
    def triton_pid(self) -> int:
        return int(_READY.findall(self.log.read_text())[-1][2])

    @property
    def model_pid(self) -> int:
        return next(model_processes(self.triton_pid))

    def tell_engine(self, what: str) -> None:
        """`raise` or `hang`, at its next denoising step."""
        temporary = self.order.with_suffix(".tmp")
        temporary.write_text(what)
        temporary.replace(self.order)

    def ready(self) -> bool:
        """As a probe sees it."""
        try:
            with urllib.request.urlopen(f"{self.http_url}/v2/models/{MODEL_NAME}/ready", timeout=2) as answer:
                return int(answer.status) == 200
        except OSError:
            return False


@contextlib.contextmanager
def supervised_server(engine: Path, *arguments: str) -> Iterator[SupervisedServer]:
    """`dgemma-server run` on free ports, ready; told to stop at the end."""
    with TemporaryDirectory() as folder:
        order, log = Path(folder) / "order", Path(folder) / "log"
        repository = patched_repository(Path(folder) / "models", _FAULTY.format(order=str(order)))
        ports = [word for name in ("http", "grpc", "metrics") for word in (f"--{name}-port", "0")]
        command = [sys.executable, "-m", "dgemma_runtime.server", "run", "--engine", str(engine), *ports]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*command, "--model-repository", str(repository), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        try:
            wait_until(lambda: process.poll() is not None or bool(_READY.search(log.read_text())), _START_S)
            if (found := _READY.search(log.read_text())) is None:
                raise RuntimeError(f"the server did not start:\n{log.read_text()[-2000:]}")
            yield SupervisedServer(process, found[1], found[2], log, order)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            process.wait(90)


def wait_until(condition: Callable[[], bool], timeout_s: float) -> float:
    """Seconds until it came true; raises TimeoutError."""
    started = time.monotonic()
    while not condition():
        if time.monotonic() > started + timeout_s:
            raise TimeoutError(f"it did not come true within {timeout_s:g} s")
        time.sleep(_POLL_S)
    return time.monotonic() - started
