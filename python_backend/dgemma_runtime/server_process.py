"""A Triton server as a child process: its command line, readiness, log and end. Knows no command line of its own.

with running_server(Path("artifacts/engines/demo")) as server:
    print(server.grpc_url)
"""

from __future__ import annotations

import contextlib
import http.client
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from dgemma_runtime.contract import Manifest
from dgemma_runtime.errors import ConfigurationError, DGemmaError
from dgemma_runtime.memory_plan import check_memory
from dgemma_runtime.process_settings import SETTINGS_VARIABLE, ProcessSettings
from dgemma_runtime.repository import model_facts, stage_repository
from dgemma_runtime.triton_install import TritonInstall, find_triton

MODEL_NAME = "diffusion_gemma"
_TRACE_HEADERS = "(?i)^(traceparent|tracestate)$"  # reach the model as request parameters, see `tracing.py`
_SHARED_MEMORY = Path("/dev/shm")
_KILL_AFTER_S = 10.0  # beyond the exit timeout that Triton itself keeps
_LAST_RESPONSES_S = 3.0  # of the exit timeout, for the responses to requests that did not end in time
_UNLOAD_S = 1.0
_POLL_S = 0.05
_KEY_HEADER = "dgemma-key"
_GUARDED = "model-repository,shared-memory,trace,logging"  # for who started the server; nobody else has use for them


class ServerStartError(DGemmaError):
    """The server ended or was not ready in time; the message has the end of its log."""


def default_model_repository() -> Path:
    """`model_repository/` of the source tree that this package lies in."""
    return Path(__file__).resolve().parents[2] / "model_repository"


@dataclass(frozen=True)
class ServerOptions:
    """How Triton itself is run; a port of 0 takes a free one."""

    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    exit_timeout_s: int = 30  # for requests under way when the server is told to stop
    verbose: bool = False  # Triton's own informational log
    model_repository: Path = field(default_factory=default_model_repository)


class RunningServer:
    """A started server. `stop` is safe to call twice; leaving `running_server` calls it."""

    def __init__(
        self, process: subprocess.Popen[bytes], options: ServerOptions, run_directory: Path, key: str = ""
    ) -> None:
        self._process, self._run_directory, self._key = process, run_directory, key
        self._terminated = False
        self.options = options  # with the ports that were found
        reachable = "127.0.0.1" if options.host in ("0.0.0.0", "localhost") else options.host
        self.grpc_url = f"{reachable}:{options.grpc_port}"  # as gRPC clients want it, without a scheme
        self.http_url = f"http://{reachable}:{options.http_port}"
        self.metrics_url = f"http://{reachable}:{options.metrics_port}/metrics"
        self.pid = process.pid
        self.log_file = run_directory / "server.log"

    @property
    def returncode(self) -> int | None:
        """Exit status, negative for a signal; None while it runs."""
        return self._process.poll()

    def model_ready(self) -> bool | None:
        """Whether Triton says that the model takes requests; None where it does not answer."""
        try:
            with urllib.request.urlopen(f"{self.http_url}/v2/models/{MODEL_NAME}/ready", timeout=5) as answer:
                return int(answer.status) == 200
        except urllib.error.HTTPError:
            return False
        except OSError:
            return None

    def model_process(self) -> int | None:
        """The pid of the process that holds the engine; Triton's readiness does not say when there is none."""
        return next(model_processes(self.pid), None)

    def model_process_alive(self) -> bool:
        return self.model_process() is not None

    def heartbeat(self) -> int:
        """Changes again and again while Python runs in the model's process; only equal or different means something."""
        try:
            return _heartbeat_file(self._run_directory).stat().st_mtime_ns
        except FileNotFoundError:
            return 0  # the model is still being loaded

    def failure_reason(self) -> str | None:
        """What the model said of its failure, if it said anything."""
        try:
            return _failure_file(self._run_directory).read_text()
        except FileNotFoundError:
            return None

    def load_model(self, timeout_s: float) -> None:
        """Load the model again after it was unloaded; raises ServerStartError when that fails."""
        _failure_file(self._run_directory).unlink(missing_ok=True)
        try:
            self._repository("load", timeout_s)
        except (OSError, http.client.HTTPException) as error:
            raise ServerStartError(f"the model could not be loaded again: {self.failure_reason() or error}") from None

    def wait_ready(self, deadline_s: float) -> None:
        """Raises ServerStartError when the server ends before it is ready, or is not ready in `deadline_s` seconds."""
        end = time.monotonic() + deadline_s
        while not self.model_ready():
            if (code := self.returncode) is not None:
                raise ServerStartError(f"the Triton server ended with status {code} before it was ready{self._why()}")
            if time.monotonic() > end:
                raise ServerStartError(f"the Triton server was not ready after {deadline_s:g} s{self._tail()}")
            time.sleep(_POLL_S)

    def terminate(self) -> None:
        """Ask the server to stop: requests under way may end within the exit timeout, new ones are refused."""
        if self.returncode is None and not self._terminated:
            self._terminated = True
            grace_s = max(self.options.exit_timeout_s - _LAST_RESPONSES_S, 0.0)
            drain = _drain_file(self._run_directory)
            drain.with_suffix(".tmp").write_text(str(grace_s))
            drain.with_suffix(".tmp").replace(drain)
            # Over connections that it has, a Triton that is ending goes on saying that the model is ready. Requests
            # under way go on. Where this fails, the model was not ready either.
            with contextlib.suppress(OSError, http.client.HTTPException):
                self._repository("unload", _UNLOAD_S)
            self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the server and its model process now; does not wait, so a signal handler may call it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def wait(self, timeout_s: float | None = None) -> int:
        """The exit status; raises subprocess.TimeoutExpired."""
        return self._process.wait(timeout_s)

    def stop(self) -> int:
        """Stop, wait, remove what it left behind; its exit status. Kills a server that exceeds its exit timeout.

        Triton 24.10 does not even unload the model while a client keeps a stream open, be it an idle one. So when the
        model says that every request has its last response, Triton is killed after a moment, and the status is 0.
        """
        self.terminate()
        drain = _drain_file(self._run_directory)
        end = time.monotonic() + self.options.exit_timeout_s + _KILL_AFTER_S
        answered: float | None = None  # since when every request is
        status = self.returncode
        while status is None:
            time.sleep(_POLL_S)
            now, status = time.monotonic(), self.returncode
            if answered is None and (not drain.exists() or not self.model_process_alive()):
                answered = now
            if status is None and answered is not None and now > answered + _LAST_RESPONSES_S:
                self.kill()
                self._process.wait()
                status = 0
            elif status is None and now > end:
                self.kill()
                status = self._process.wait()
        if status != 0:
            self.kill()  # the model's process, which a server that did not end by itself leaves behind
        self.clean_up()
        return status

    def clean_up(self) -> None:
        """After the end: remove the run directory and shared memory of a server that could not do it itself."""
        for region in _SHARED_MEMORY.glob(f"{_region_prefix(self._run_directory)}*"):
            region.unlink(missing_ok=True)
        shutil.rmtree(self._run_directory, ignore_errors=True)

    def log_tail(self, lines: int = 25) -> str:
        """The end of the server's log without its tables; "" where it goes to stderr."""
        if not self.log_file.is_file():
            return ""
        text = self.log_file.read_text(errors="replace")
        kept = [line for line in text.splitlines() if line.strip() and not line.startswith(("+-", "| "))]
        return "\n".join(kept[-lines:])

    def _repository(self, action: str, timeout_s: float) -> None:
        """Triton's repository API: `load` returns when the model is ready, `unload` at once."""
        url = f"{self.http_url}/v2/repository/models/{MODEL_NAME}/{action}"
        headers = {"Content-Type": "application/json", _KEY_HEADER: self._key}
        urllib.request.urlopen(urllib.request.Request(url, b"{}", headers), timeout=timeout_s).close()

    def _why(self) -> str:
        """The model's own words where it has left some, else the end of the log."""
        reason = self.failure_reason()
        return self._tail() if reason is None else f": {reason}"

    def _tail(self) -> str:
        tail = self.log_tail()
        return f"; the end of its log:\n{tail}" if tail else ""


def start_server(settings: ProcessSettings, options: ServerOptions, log_to_file: bool = False) -> RunningServer:
    """Check everything that can be checked, then start Triton; returns before it is ready.

    Raises ConfigurationError or ManifestError, whose messages say what to do.
    """
    install = find_triton()
    manifest = Manifest.load(settings.engine)
    check_memory(settings.engine, manifest, settings.runtime)
    options = _with_ports(options)
    if not (options.model_repository / MODEL_NAME / "config.pbtxt").is_file():
        raise ConfigurationError(
            f"{options.model_repository}: no model repository with {MODEL_NAME}; name the one of the source tree"
        )
    run_directory = Path(tempfile.mkdtemp(prefix="dgemma-server-"))
    facts = model_facts(manifest, settings.runtime)
    repository = stage_repository(options.model_repository, run_directory / "models", MODEL_NAME, facts)
    drafter = settings.runtime.draft_model
    placed = replace(
        settings,
        engine=settings.engine.resolve(),
        runtime=replace(settings.runtime, draft_model=drafter and str(Path(drafter).resolve())),
        drain_file=_drain_file(run_directory),
        failure_file=_failure_file(run_directory),
        heartbeat_file=_heartbeat_file(run_directory),
    )
    key = secrets.token_hex(16)
    environment = install.environment(os.environ) | {SETTINGS_VARIABLE: placed.to_json()}
    with contextlib.ExitStack() as stack:
        output: IO[bytes] | None = None
        if log_to_file:
            output = stack.enter_context((run_directory / "server.log").open("wb"))
        process = subprocess.Popen(
            command(install, replace(options, model_repository=repository), run_directory, key),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
            start_new_session=True,  # a terminal's Ctrl-C reaches the supervisor alone, which passes it on once
        )
    return RunningServer(process, options, run_directory, key)


@contextlib.contextmanager
def running_server(
    engine: Path,
    *,
    options: ServerOptions | None = None,
    deadline_s: float = 120.0,
    **settings: Any,
) -> Iterator[RunningServer]:
    """A server on free loopback ports, ready for requests; stopped at the end. `settings`: see ProcessSettings.

    Raises ConfigurationError, ManifestError, or ServerStartError with the end of the server's log.
    """
    options = options or ServerOptions(http_port=0, grpc_port=0, metrics_port=0)
    server = start_server(ProcessSettings.from_mapping({"engine": engine, **settings}), options, log_to_file=True)
    try:
        server.wait_ready(deadline_s)
        yield server
    finally:
        server.stop()


def command(install: TritonInstall, options: ServerOptions, run_directory: Path, key: str) -> list[str]:
    """Triton's command line. `_GUARDED` is open to who has `key`; a model needs none, see `triton_backend`."""
    flag = str(options.verbose).lower()
    return [
        str(install.binary),
        f"--model-repository={options.model_repository}",
        f"--backend-directory={install.stage_backends(run_directory)}",
        f"--backend-config=python,shm-region-prefix-name={_region_prefix(run_directory)}",
        "--model-control-mode=explicit",  # lets a model whose engine has failed withdraw its readiness
        f"--load-model={MODEL_NAME}",
        "--disable-auto-complete-config",
        f"--http-restricted-api={_GUARDED}:{_KEY_HEADER}={key}",
        f"--grpc-restricted-protocol={_GUARDED}:{_KEY_HEADER}={key}",
        *(f"--{name}-header-forward-pattern={_TRACE_HEADERS}" for name in ("http", "grpc")),
        *(f"--{name}-address={options.host}" for name in ("http", "grpc", "metrics")),
        f"--http-port={options.http_port}",
        f"--grpc-port={options.grpc_port}",
        f"--metrics-port={options.metrics_port}",
        # Ends the request of a client that is gone without a word, or stopped; what it does not read is kept for it.
        "--grpc-keepalive-time=20000",
        "--grpc-keepalive-timeout=20000",
        "--allow-gpu-metrics=false",
        f"--exit-timeout-secs={options.exit_timeout_s}",
        f"--log-info={flag}",
    ]


def _region_prefix(run_directory: Path) -> str:
    """Unique to this server, so that what it leaves behind can be told from what others use."""
    return run_directory.name.replace("-", "_") + "_"


def _drain_file(run_directory: Path) -> Path:
    return run_directory / "drain"


def _failure_file(run_directory: Path) -> Path:
    return run_directory / "failure"


def _heartbeat_file(run_directory: Path) -> Path:
    return run_directory / "heartbeat"


# ---------------------------------------------------------------- ports and processes


def _with_ports(options: ServerOptions) -> ServerOptions:
    """Free ports in place of 0; raises ConfigurationError for a port that is taken, or given twice."""
    names = ("http_port", "grpc_port", "metrics_port")
    with contextlib.ExitStack() as held:  # all at once, so that no free port is chosen twice
        http, grpc, metrics = (_bound_port(held, options.host, name, getattr(options, name)) for name in names)
    return replace(options, http_port=http, grpc_port=grpc, metrics_port=metrics)


def _bound_port(held: contextlib.ExitStack, host: str, name: str, port: int) -> int:
    flag = "--" + name.replace("_", "-")
    if not 0 <= port <= 65535:
        raise ConfigurationError(f"{name} must be from 0 to 65535, got {port}")
    probe = held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        probe.bind((host, port))
        probe.listen(1)
    except socket.gaierror as error:
        raise ConfigurationError(f"host must be an IPv4 address of this machine, got {host!r} ({error})") from None
    except OSError as error:
        raise ConfigurationError(
            f"{name} {port} on {host} cannot be used ({error.strerror}); stop what uses it, or choose another with "
            f"{flag} (0: any free one)"
        ) from None
    return int(probe.getsockname()[1])


def model_processes(server_pid: int) -> Iterator[int]:
    """The pids of the server's children that run Python models."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and is_stub(int(entry.name), server_pid):
            yield int(entry.name)


def is_stub(pid: int, server_pid: int) -> bool:
    """Whether this process runs, not as a zombie, and is a Python model of that server; see proc(5)."""
    try:
        name, _, rest = Path(f"/proc/{pid}/stat").read_text().partition("(")[2].rpartition(")")
    except OSError:
        return False  # it has ended
    state, parent = rest.split()[:2]
    return int(parent) == server_pid and name.startswith("triton_python_b") and state not in "ZX"
