"""The command `dgemma-server`: a Triton server with this project's model in the foreground. Knows no request."""

from __future__ import annotations

from pathlib import Path
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
from dgemma_runtime.supervisor import RestartPolicy, Supervisor, say

__all__ = ["RunningServer", "ServerOptions", "ServerStartError", "main", "running_server", "start_server"]

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
    prefix_cache: Annotated[bool, typer.Option(help="Keep what prompts have in common for later ones.")] = True,
    threads: Annotated[int | None, typer.Option(help="Cores for the engine; 0: all.")] = None,
    gpu: Annotated[int | None, typer.Option(help="Number of the GPU, for an engine that needs one.")] = None,
    cuda_graphs: Annotated[bool, typer.Option(help="Replay captured denoising steps, on a GPU.")] = True,
    draft_model: Annotated[Path | None, typer.Option(help="Engine directory of a drafter for this engine.")] = None,
    warm_up: Annotated[bool, typer.Option(help="Run a short generation before the model is ready.")] = True,
    log_level: Annotated[str, typer.Option(help="Of the model's log: DEBUG, INFO, WARNING or ERROR.")] = "INFO",
    log_format: Annotated[str, typer.Option(help="Of the model's log: text, or json, an object per line.")] = "text",
    traces: Annotated[bool, typer.Option(help="Export OpenTelemetry spans as the OTEL_* variables say.")] = False,
    model_repository: Annotated[Path | None, typer.Option(help="Default: that of the source tree.")] = None,
    exit_timeout: Annotated[int, typer.Option(help="Seconds for running requests at shutdown.")] = 30,
    start_timeout: Annotated[float, typer.Option(help="Seconds until the model must be ready.")] = 600,
    step_timeout: Annotated[float, typer.Option(help="Seconds until an engine call is taken to hang.")] = 120,
    restarts: Annotated[int, typer.Option(help="Of a failed engine or server, before giving up; 0: none.")] = 5,
    restart_window: Annotated[float, typer.Option(help="Seconds without failure that clear the count.")] = 300,
    verbose: Annotated[bool, typer.Option(help="Show Triton's own informational log.")] = False,
) -> None:
    """Start the server and stay until it ends.

    Prints a line with the addresses on stderr when it is ready. What fails while it serves is started again. Ctrl-C or
    SIGTERM lets running requests end, a second one does not. Exit status: 0 after a requested stop, 1 when the server
    could not start or has failed too often.
    """
    runtime = {
        "max_model_len": max_model_len,
        "max_batch_size": max_batch_size,
        "queue_size": queue_size,
        "kv_memory_bytes": kv_memory_bytes,
        "prefix_cache": prefix_cache,
        "threads": threads,
        "gpu": gpu,
        "cuda_graphs": cuda_graphs,
        "draft_model": None if draft_model is None else str(draft_model),
    }
    process = {
        "warm_up": warm_up,
        "log_level": log_level,
        "log_format": log_format,
        "traces": traces,
        "step_timeout_s": step_timeout,
    }
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
        policy = RestartPolicy(restarts, restart_window)
        settings = ProcessSettings.from_mapping({"engine": engine, **process, **chosen})
        _warn_if_open(host)
        code = Supervisor(settings, options, policy, start_timeout).run()
    except DGemmaError as error:
        say(f"error: {error}")
        raise typer.Exit(1) from None
    raise typer.Exit(code)


def _warn_if_open(host: str) -> None:
    if host not in ("127.0.0.1", "localhost"):
        say(
            f"warning: listening on {host} without authentication; put a proxy in front that caps bodies below 4 MiB "
            "(larger HTTP bodies crash Triton 24.10)"
        )


def main() -> None:
    app()


if __name__ == "__main__":
    main()
