"""The command lines that a container runs, out of its configuration. Pure; knows no process."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from dgemma_nim.configuration import Configuration
from dgemma_nim.profiles import Profile

_DRAIN_MARGIN_S = 5  # that Triton has beyond the front end's drain: its last requests are the front end's
LOOPBACK = "127.0.0.1"
EVERYWHERE = "0.0.0.0"


@dataclass(frozen=True)
class Programs:
    """What the other packages are started as: by default the commands beside this interpreter."""

    front_end: tuple[str, ...]
    server: tuple[str, ...]
    build: tuple[str, ...]

    @staticmethod
    def installed() -> Programs:
        folder = Path(sys.executable).parent
        return Programs(
            (str(folder / "dgemma-openai"), "serve"),
            (str(folder / "dgemma-server"), "run"),
            (str(folder / "dgemma-build"), "engine"),
        )


def front_end_command(program: tuple[str, ...], configuration: Configuration) -> list[str]:
    """`dgemma-openai serve`, in front of Triton on loopback."""
    words = [*program, "--host", configuration.host, "--port", str(configuration.server_port)]
    words += ["--triton", f"{LOOPBACK}:{configuration.triton_grpc_port}"]
    words += ["--triton-metrics", f"http://{LOOPBACK}:{configuration.triton_metrics_port}/metrics"]
    for name in configuration.served_model_names:
        words += ["--served-model-name", name]
    for origin in configuration.cors_origins:
        words += ["--cors-origin", origin]
    if configuration.ssl_mode != "disabled":
        words += _options(("--tls-certificate", configuration.ssl_certificate), ("--tls-key", configuration.ssl_key))
    if configuration.ssl_mode == "mtls":
        words += _options(("--tls-client-ca", configuration.ssl_client_ca))
    words += _options(
        ("--api-key-hashes", configuration.api_key_hashes),
        ("--max-body-bytes", configuration.max_body_bytes),
        ("--requests-per-minute", configuration.requests_per_minute),
        ("--timeout-s", configuration.timeout_s),
        ("--health-port", configuration.health_port),
        ("--drain-s", configuration.drain_s),
        ("--log-level", configuration.log_level),
        ("--log-format", configuration.log_format),
    )
    words += ["--log-prompts"] if configuration.log_prompts else []
    return [*words, *([] if configuration.playground else ["--no-playground"])]


def server_command(program: tuple[str, ...], configuration: Configuration, engine: Path) -> list[str]:
    """`dgemma-server run`: Triton, on loopback unless it is to be reached from elsewhere."""
    words = [*program, "--engine", str(engine), "--host", EVERYWHERE if configuration.expose_triton else LOOPBACK]
    words += _options(
        ("--http-port", configuration.triton_http_port),
        ("--grpc-port", configuration.triton_grpc_port),
        ("--metrics-port", configuration.triton_metrics_port),
        ("--max-model-len", configuration.max_model_len),
        ("--max-batch-size", configuration.max_batch_size),
        ("--queue-size", configuration.queue_size),
        ("--kv-memory-bytes", configuration.kv_memory_bytes),
        ("--threads", configuration.threads),
        ("--draft-model", configuration.draft_model),
        ("--exit-timeout", configuration.drain_s + _DRAIN_MARGIN_S),
        ("--start-timeout", configuration.start_timeout_s),
        ("--log-level", configuration.log_level),
        ("--log-format", configuration.log_format),
    )
    words += [] if configuration.prefix_cache else ["--no-prefix-cache"]
    words += [] if configuration.cuda_graphs else ["--no-cuda-graphs"]
    return [*words, *(["--traces"] if configuration.traces else [])]


def build_command(program: tuple[str, ...], checkpoint: Path, profile: Profile, output: Path) -> list[str]:
    """`dgemma-build engine`; goes on where an earlier run with the same words was interrupted."""
    return [*program, "--checkpoint", str(checkpoint), "--output", str(output), *profile.flags]


def _options(*pairs: tuple[str, object]) -> list[str]:
    return [word for flag, value in pairs if value is not None for word in (flag, str(value))]
