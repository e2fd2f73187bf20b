"""Keeps a server serving: starts it, watches its processes, starts again what has failed, passes signals on.

What can fail, and what is done:
- the engine (an exception, a call that overruns): the model gives every client its error, withdraws its readiness and
  ends; it is loaded again by Triton, whose connections, liveness and metrics stay;
- the model's process (a crash, no heartbeat), or Triton itself: everything is ended at once and started again on the
  same ports. Triton 24.10 never ends the streams of a model process that has crashed, so closing their connections is
  the only way to tell its clients; and it goes on saying that the model is ready.
Knows processes and Triton's readiness, no request.
"""

from __future__ import annotations

import signal
import sys
import time
from dataclasses import dataclass
from types import FrameType

from dgemma_runtime.errors import ConfigurationError, DGemmaError
from dgemma_runtime.process_settings import ProcessSettings
from dgemma_runtime.server_process import RunningServer, ServerOptions, ServerStartError, is_stub, start_server

_POLL_S = 0.1
_LONGEST_PAUSE_S = 30.0


@dataclass(frozen=True)
class RestartPolicy:
    """How much failing is too much; raises ConfigurationError."""

    restarts: int = 5  # one after another; 0: the first failure ends the server
    window_s: float = 300.0  # of readiness without a failure, after which the count starts again

    def __post_init__(self) -> None:
        if self.restarts < 0:
            raise ConfigurationError(f"restarts must be at least 0, got {self.restarts}")
        if not self.window_s > 0:
            raise ConfigurationError(f"restart_window must be above 0 seconds, got {self.window_s}")

    def pause_s(self, attempt: int) -> float:
        """Before a restart, counted from 1: none before the first, then 1, 2, 4, ... seconds."""
        return 0.0 if attempt == 1 else min(2.0 ** (attempt - 2), _LONGEST_PAUSE_S)


class RestartCount:
    """Counts the restarts of one server against the policy."""

    def __init__(self, policy: RestartPolicy) -> None:
        self._policy = policy
        self._done = 0
        self._ready_since: float | None = None

    def ready(self, now: float) -> None:
        self._ready_since = now

    def failed(self, now: float) -> int | None:
        """The number of the restart that is to follow, from 1; None where it would be one too many."""
        if self._ready_since is not None and now - self._ready_since > self._policy.window_s:
            self._done = 0
        self._ready_since = None
        self._done += 1
        return self._done if self._done <= self._policy.restarts else None


@dataclass(frozen=True)
class Failure:
    """Why a server does not serve, and whether loading its model again is enough."""

    reason: str
    reload: bool = False


class Supervisor:
    """One server in the foreground, from its start to its end."""

    def __init__(
        self, settings: ProcessSettings, options: ServerOptions, policy: RestartPolicy, start_timeout_s: float
    ) -> None:
        self._settings, self._options, self._policy = settings, options, policy
        self._start_timeout_s = start_timeout_s
        self._count = RestartCount(policy)
        self._server: RunningServer | None = None  # None before the first start and while there is none
        self._stops = 0  # signals received

    def run(self) -> int:
        """The exit status; raises DGemmaError when the first start fails."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        try:
            try:
                self._start()
            except ServerStartError:
                if not self._told_to_stop():
                    raise
            while (failure := self._watch()) is not None:
                if not self._recover(failure):
                    return 1
            return self._stopped()
        finally:
            self._take_down()

    # ------------------------------------------------------------ up and down

    def _start(self) -> None:
        """Everything; raises DGemmaError."""
        server = self._server = start_server(self._settings, self._options)
        self._options = server.options  # a restart is found under the same ports
        if self._told_to_stop():  # a signal came while it was being started
            server.terminate()
        server.wait_ready(self._start_timeout_s)
        self._say_ready(server)

    def _reload(self) -> None:
        """The model alone; raises DGemmaError."""
        assert self._server is not None
        self._server.load_model(self._start_timeout_s)
        self._server.wait_ready(self._start_timeout_s)
        self._say_ready(self._server)

    def _say_ready(self, server: RunningServer) -> None:
        self._count.ready(time.monotonic())
        say(f"ready: gRPC {server.grpc_url}, HTTP {server.http_url}, metrics {server.metrics_url} (pid {server.pid})")

    def _take_down(self) -> None:
        """At once, without a grace."""
        if (server := self._server) is not None:
            server.kill()
            server.stop()
            self._server = None

    # ------------------------------------------------------------ watching

    def _watch(self) -> Failure | None:
        """Blocks while the server serves; None when it is to stop."""
        server = self._server
        pid = server.model_process() if server is not None else None
        beat, quiet_s = 0, 0.0  # time of watching without a new beat: a machine that sleeps does not count
        while not self._told_to_stop():
            assert server is not None
            if (now := server.heartbeat()) != beat:
                beat, quiet_s = now, 0.0
            if (failure := self._failure(server, pid, quiet_s)) is not None:
                return None if self._told_to_stop() else failure
            time.sleep(_POLL_S)
            quiet_s += _POLL_S
        return None

    def _failure(self, server: RunningServer, pid: int | None, quiet_s: float) -> Failure | None:
        if (status := server.returncode) is not None:
            return Failure(f"the server ended by itself with status {status}")
        if pid is None or not is_stub(pid, server.pid):
            if server.model_ready() is False:  # withdrawn: every client has its error
                return Failure(server.failure_reason() or "the model was unloaded", reload=True)
            return Failure("the model's process has crashed")
        if quiet_s > self._settings.step_timeout_s:
            return Failure(f"the model's process has shown no sign of life for {quiet_s:.1f} s")
        return None

    # ------------------------------------------------------------ restarting

    def _recover(self, failure: Failure) -> bool:
        """Whether the server serves again, or is to stop; False when it is to be given up."""
        while True:
            since = time.monotonic()
            attempt = self._count.failed(since)
            if attempt is None:
                say(f"error: {failure.reason}; {self._given_up()}")
                return False
            pause_s = self._policy.pause_s(attempt)
            reload = failure.reload and attempt == 1  # a second failure so soon: nothing of the old server is kept
            what = "loading the model again" if reload else "starting the server again"
            when = f" in {pause_s:g} s" if pause_s else ""
            say(f"error: {failure.reason}; {what}{when} (restart {attempt} of {self._policy.restarts})")
            if not reload:
                self._take_down()
            self._sleep(pause_s)
            if self._told_to_stop():
                return True
            try:
                self._reload() if reload else self._start()
            except DGemmaError as error:
                if self._told_to_stop():
                    return True
                failure = Failure(str(error))
            else:
                return True

    def _given_up(self) -> str:
        if not self._policy.restarts:
            return "no restart is allowed (--restarts 0)"
        return f"given up after {self._policy.restarts} restarts without {self._policy.window_s:g} s of service"

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self._told_to_stop() and time.monotonic() < end:
            time.sleep(_POLL_S)

    # ------------------------------------------------------------ stopping

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stops += 1
        if self._server is None:
            return
        if self._stops == 1:
            say("stopping: running requests may end (again to stop at once)")
            self._server.terminate()
        else:
            self._server.kill()

    def _told_to_stop(self) -> bool:
        return self._stops > 0

    def _stopped(self) -> int:
        status = self._server.stop() if self._server is not None else 0
        self._server = None
        expected = status == 0 or self._stops > 1 or status == -signal.SIGTERM  # the last: Triton while it loads
        say("stopped" if expected else f"stopped with status {status}")
        return 0 if expected else 1


def say(text: str) -> None:
    """A line for whoever runs the command."""
    print(f"dgemma-server: {text}", file=sys.stderr, flush=True)
