"""The command `dgemma-openai`. Knows no route."""

from __future__ import annotations

import hashlib
import secrets
import sys
from pathlib import Path
from typing import Annotated

import typer

from dgemma_openai import logs
from dgemma_openai.server import serve as run_server
from dgemma_openai.settings import Settings, SettingsError, read_api_keys

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Serve the APIs of OpenAI and NIM in front of a DiffusionGemma model on Triton.",
)
_DEFAULT = Settings()


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every interface.")] = _DEFAULT.host,
    port: Annotated[int, typer.Option(help="0: any free port.")] = _DEFAULT.port,
    health_port: Annotated[int | None, typer.Option(help="A port more for health alone, without TLS.")] = None,
    triton: Annotated[str, typer.Option(help="Triton's gRPC address, host:port.")] = _DEFAULT.triton,
    triton_metrics: Annotated[str | None, typer.Option(help="URL of Triton's metrics, shown with our own.")] = None,
    model: Annotated[str, typer.Option(help="Triton's name of the model.")] = _DEFAULT.model,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="Name for requests; may be given again, the first is in answers.")
    ] = None,
    api_key_hashes: Annotated[Path | None, typer.Option(help="File of `hash-key` lines; without it, no keys.")] = None,
    tls_certificate: Annotated[Path | None, typer.Option(help="PEM file.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM file.")] = None,
    tls_client_ca: Annotated[Path | None, typer.Option(help="PEM file; clients must show a certificate of it.")] = None,
    cors_origin: Annotated[list[str] | None, typer.Option(help="Origin of pages that may ask; again for more.")] = None,
    max_body_bytes: Annotated[int, typer.Option(help="Larger requests get 413.")] = _DEFAULT.max_body_bytes,
    max_choices: Annotated[int, typer.Option(help="Answers of one request: prompts times n.")] = _DEFAULT.max_choices,
    requests_per_minute: Annotated[int | None, typer.Option(help="Of one key, or of one address.")] = None,
    timeout_s: Annotated[float, typer.Option(help="Seconds for one answer.")] = _DEFAULT.timeout_s,
    drain_s: Annotated[float, typer.Option(help="Seconds for running answers at shutdown.")] = _DEFAULT.drain_s,
    log_level: Annotated[str, typer.Option(help=f"One of {', '.join(logs.LEVELS)}.")] = "INFO",
    log_format: Annotated[str, typer.Option(help="text, or json: an object per line.")] = "text",
    log_prompts: Annotated[bool, typer.Option(help="Write prompts and answers into the log.")] = False,
    playground: Annotated[bool, typer.Option(help="Show a page for people at /.")] = True,
) -> None:
    """Start the front end and stay until it ends.

    Prints a line with the address on stderr when it listens. SIGTERM or Ctrl-C lets running answers end, a second one
    does not. Exit status: 0 after a requested stop, 1 when it could not start.
    """
    try:
        _check("log_level", log_level, logs.LEVELS)
        _check("log_format", log_format, logs.FORMATS)
        settings = Settings(
            host=host,
            port=port,
            health_port=health_port,
            triton=triton,
            triton_metrics=triton_metrics,
            model=model,
            served_model_names=tuple(served_model_name or ()),
            api_keys=read_api_keys(api_key_hashes) if api_key_hashes else (),
            tls_certificate=tls_certificate,
            tls_key=tls_key,
            tls_client_ca=tls_client_ca,
            cors_origins=tuple(cors_origin or ()),
            max_body_bytes=max_body_bytes,
            max_choices=max_choices,
            requests_per_minute=requests_per_minute,
            timeout_s=timeout_s,
            drain_s=drain_s,
            log_prompts=log_prompts,
            playground=playground,
        )
        logs.configure(log_level, log_format)
        code = run_server(settings)
    except SettingsError as error:
        print(f"dgemma-openai: error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    raise typer.Exit(code)


@app.command()
def hash_key(
    name: Annotated[str, typer.Argument(help="Of whoever gets the key; for logs and rate limits.")] = "",
    key: Annotated[str | None, typer.Option(help="A key of your own; default: a new one, shown on stderr.")] = None,
) -> None:
    """Print the line for --api-key-hashes."""
    if key is None:
        key = f"sk-dgemma-{secrets.token_urlsafe(32)}"
        print(f"key, shown only now: {key}", file=sys.stderr)
    print(f"{hashlib.sha256(key.encode()).hexdigest()} {name}".rstrip())


def _check(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise SettingsError(f"{name}: must be one of {', '.join(allowed)}, got {value!r}")


def main() -> None:
    app()


if __name__ == "__main__":
    main()
