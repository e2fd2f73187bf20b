"""The command `dgemma-server`: a Triton server with this project's model in the foreground. Knows no request."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from dgemma_runtime.errors import DGemmaError
from dgemma_runtime.process_settings import ProcessSettings
from dgemma_runtime.server_process import (
    RunningServer,
    ServerOptions,
    ServerStartError,
    default_model_repository,
    running_server,
    start_server,
)

__all__ = ["RunningServer", "ServerOptions", "ServerStartError", "main", "running_server", "start_server"]

_WATCH_S = 1.0

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Serve DiffusionGemma with NVIDIA Triton.",
)


@app.callback()
def _commands() -> None:
    """Keeps `run` a command of its own."""


@app.command()
def run(
    engine: Annotated[Path, typer.Option(help="Engine directory, made by `dgemma-build engine`.")],
    host: Annotated[str, typer.Option(help="IPv4 address to listen on; 0.0.0.0 is every interface.")] = "127.0.0.1",
    http_port: Annotated[int, typer.Option(help="0: any free port.")] = 8000,
    grpc_port: Annotated[int, typer.Option(help="0: any free port.")] = 8001,
    metrics_port: Annotated[int, typer.Option(help="0: any free port.")] = 8002,
    max_model_len: Annotated[int | None, typer.Option(help="Prompt and output, in tokens; default: engine's.")] = None,
    max_batch_size: Annotated[int | None, typer.Option(help="Requests that run at once.")] = None,
    queue_size: Annotated[int | None, typer.Option(help="Requests that may wait.")] = None,
    kv_memory_bytes: Annotated[int | None, typer.Option(help="Memory for keys and values.")] = None,
    threads: Annotated[int | None, typer.Option(help="Cores for the engine; 0: all.")] = None,
    gpu: Annotated[int | None, typer.Option(help="Number of the GPU, for an engine that needs one.")] = None,
    cuda_graphs: Annotated[bool, typer.Option(help="Replay captured denoising steps, on a GPU.")] = True,
    warm_up: Annotated[bool, typer.Option(help="Run a short generation before the model is ready.")] = True,
    log_format: Annotated[str, typer.Option(help="Of the model's log: text, or json, an object per line.")] = "text",
    traces: Annotated[bool, typer.Option(help="Export OpenTelemetry spans as the OTEL_* variables say.")] = False,
    model_repository: Annotated[Path | None, typer.Option(help="Default: that of the source tree.")] = None,
    exit_timeout: Annotated[int, typer.Option(help="Seconds for running requests at shutdown.")] = 30,
    start_timeout: Annotated[float, typer.Option(help="Seconds until the model must be ready.")] = 600,
    verbose: Annotated[bool, typer.Option(help="Show Triton's own informational log.")] = False,
) -> None:
    """Start the server and stay until it ends.

    Prints a line with the addresses on stderr when it is ready. Ctrl-C or SIGTERM lets running requests end, a second
    one does not. Exit status: 0 after a requested stop, 1 when the server could not start or its engine has failed.
    """
    runtime = {
        "max_model_len": max_model_len,
        "max_batch_size": max_batch_size,
        "queue_size": queue_size,
        "kv_memory_bytes": kv_memory_bytes,
        "threads": threads,
        "gpu": gpu,
        "cuda_graphs": cuda_graphs,
    }
    process = {"warm_up": warm_up, "log_format": log_format, "traces": traces}
    chosen: dict[str, Any] = {name: value for name, value in runtime.items() if value is not None}
    options = ServerOptions(
        host=host,
        http_port=http_port,
        grpc_port=grpc_port,
        metrics_port=metrics_port,
        exit_timeout_s=exit_timeout,
        verbose=verbose,
        model_repository=model_repository or default_model_repository(),
    )
    try:
        settings = ProcessSettings.from_mapping({"engine": engine, **process, **chosen})
        code = _Foreground(settings, options).run(start_timeout)
    except DGemmaError as error:
        _say(f"error: {error}")
        raise typer.Exit(1) from None
    raise typer.Exit(code)


class _Foreground:
    """One server, its signals and its end."""

    def __init__(self, settings: ProcessSettings, options: ServerOptions) -> None:
        self._settings, self._options = settings, options
        self._server: RunningServer | None = None
        self._stops = 0

    def run(self, start_timeout_s: float) -> int:
        """The exit status."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        if self._options.host not in ("127.0.0.1", "localhost"):
            _say(
                f"warning: listening on {self._options.host} without authentication; put a proxy in front that caps "
                "bodies below 4 MiB (larger HTTP bodies crash Triton 24.10)"
            )
        self._server = server = start_server(self._settings, self._options)
        try:
            if self._stops:  # a signal came while it was being started
                server.terminate()
            code = self._supervise(server, start_timeout_s)
        finally:
            server.stop()
        return code

    def _supervise(self, server: RunningServer, start_timeout_s: float) -> int:
        try:
            server.wait_ready(start_timeout_s)
        except ServerStartError:
            if self._stops:
                return self._ended(server.stop())
            raise
        _say(f"ready: gRPC {server.grpc_url}, HTTP {server.http_url}, metrics {server.metrics_url} (pid {server.pid})")
        while not self._stops:
            try:
                return self._ended(server.wait(_WATCH_S))
            except subprocess.TimeoutExpired:
                if not self._stops and (reason := _failure(server)):
                    _say(f"error: {reason}; stopping the server, its log above says why")
                    server.kill()
                    return 1
        return self._ended(server.stop())

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stops += 1
        if self._server is None:
            return
        if self._stops == 1:
            _say("stopping: running requests may end (again to stop at once)")
            self._server.terminate()
        else:
            self._server.kill()

    def _ended(self, status: int) -> int:
        if self._stops:
            expected = status == 0 or self._stops > 1 or status == -signal.SIGTERM  # the last: Triton while it loads
            _say("stopped" if expected else f"stopped with status {status}")
            return 0 if expected else 1
        _say(f"error: the server ended by itself with status {status}")
        return 1


def _failure(server: RunningServer) -> str | None:
    """Why the server can no longer serve, as far as it says so; None while it can."""
    if server.model_ready() is False:
        return "the engine has failed and the model is not ready any more"
    if server.returncode is None and not server.model_process_alive():
        return "the model's process has crashed"
    return None


def _say(text: str) -> None:
    print(f"dgemma-server: {text}", file=sys.stderr, flush=True)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
