"""The settings of `nim-serve`: the flags, variables and file keys that set each, and how a value is read.

One table, from which the parser, the resolution by rank and the documentation are made. Knows no process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dgemma_runtime.errors import ConfigurationError

TRUE, FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
LOG_LEVELS = {
    "DEFAULT": "INFO",
    "TRACE": "DEBUG",
    "DEBUG": "DEBUG",
    "INFO": "INFO",
    "WARNING": "WARNING",
    "ERROR": "ERROR",
    "CRITICAL": "ERROR",
}
SSL_MODES = ("disabled", "tls", "mtls")


def text(value: str) -> str:
    return value


def names(value: str) -> tuple[str, ...]:
    """Separated by commas; raises ValueError where one is empty."""
    found = tuple(item.strip() for item in value.split(","))
    if not all(found):
        raise ValueError("names separated by commas, none of them empty")
    return found


def boolean(value: str) -> bool:
    word = value.strip().lower()
    if word not in (*TRUE, *FALSE):
        raise ValueError("1 or 0, true or false")
    return word in TRUE


def port(value: str) -> int:
    if value.startswith("tcp://"):
        raise ValueError("a port; this one comes from a Kubernetes service: set enableServiceLinks: false in the pod")
    return whole(value, 1, 65535)


def count(value: str) -> int:
    return whole(value, 1, 2**63 - 1)


def count_or_none(value: str) -> int:
    return whole(value, 0, 2**63 - 1)


def whole(value: str, least: int, most: int) -> int:
    wanted = f"a whole number from {least} to {most}" if most < 2**63 - 1 else f"a whole number of at least {least}"
    try:
        number = int(value)
    except ValueError:
        raise ValueError(wanted) from None
    if not least <= number <= most:
        raise ValueError(wanted)
    return number


def seconds(value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        raise ValueError("a number of seconds above 0") from None
    if not 0 < number < float("inf"):
        raise ValueError("a number of seconds above 0")
    return number


def log_level(value: str) -> str:
    if value.upper() not in LOG_LEVELS:
        raise ValueError(f"one of {', '.join(LOG_LEVELS)}")
    return LOG_LEVELS[value.upper()]


def log_format(value: str) -> str:
    if value not in ("text", "json"):
        raise ValueError("text or json")
    return value


def jsonl(value: str) -> str:
    return "json" if boolean(value) else "text"


def ssl_mode(value: str) -> str:
    if value.lower() not in SSL_MODES:
        raise ValueError(f"one of {', '.join(SSL_MODES)}")
    return value.lower()


def inverse(value: str) -> bool:
    return not boolean(value)


@dataclass(frozen=True)
class Setting:
    """One setting; `Configuration` has a field of this name."""

    name: str
    meaning: str
    read: Callable[[str], Any] = text
    flags: tuple[str, ...] = ()
    off: tuple[str, ...] = ()  # flags that switch it off; with these, `flags` take no value either
    variables: tuple[str, ...] = ()  # the first one that is set and not empty counts
    default: Any = None
    read_variable: Callable[[str], Any] | None = None  # where a variable says it differently
    in_file: bool = True  # whether `runtime_config.json` may set it

    @property
    def is_switch(self) -> bool:
        return self.read is boolean

    def value(self, source: str, given: str, variable: bool = False) -> Any:
        """The value that a text means; raises ConfigurationError naming where it stands and what may stand there."""
        read = self.read_variable if variable and self.read_variable else self.read
        try:
            return read(given)
        except ValueError as error:
            raise ConfigurationError(f"{source} is {given!r}; it must be {error}") from None


def _switch(name: str, on: str, default: bool, meaning: str, **more: Any) -> Setting:
    return Setting(name, meaning, boolean, (f"--{on}",), (f"--no-{on}", *more.pop("off", ())), default=default, **more)


SETTINGS: tuple[Setting, ...] = (
    Setting(
        "model",
        "checkpoint directory, engine directory, or hf://ORGANISATION/NAME[:REVISION]",
        flags=("--model", "--model-path"),
        variables=("NIM_MODEL_PATH", "NIM_MODEL_NAME"),
        in_file=False,
    ),
    Setting(
        "model_profile",
        "id or tag from list-model-profiles; the best compatible one where none is named",
        flags=("--model-profile", "--profile"),
        variables=("NIM_MODEL_PROFILE",),
    ),
    Setting(
        "cache_path",
        "where downloads and engines are kept",
        flags=("--cache-path",),
        variables=("NIM_ENGINE_MODEL_PATH", "NIM_CACHE_PATH"),
        default="/opt/nim/.cache",
        in_file=False,
    ),
    _switch(
        "download",
        "download",
        True,
        "fetch hf:// models; off: only what is in the cache",
        variables=("NIM_DISABLE_MODEL_DOWNLOAD",),
        read_variable=inverse,
    ),
    _switch(
        "download_only",
        "download-only",
        False,
        "fetch the model, build its engine, and exit",
        variables=("NIM_ENGINE_MODEL_DOWNLOAD_ONLY",),
        in_file=False,
    ),
    Setting(
        "served_model_names",
        "names of the model in requests; the first is the one in answers; default: the model's own",
        names,
        ("--served-model-name",),
        variables=("NIM_SERVED_MODEL_NAME",),
        default=(),
    ),
    Setting(
        "max_model_len",
        "tokens of prompt and output together; default: the model's own",
        count,
        ("--max-model-len",),
        variables=("NIM_MAX_MODEL_LEN",),
    ),
    Setting(
        "max_batch_size",
        "requests that run at once",
        count,
        ("--max-batch-size", "--max-num-seqs"),
        variables=("DGEMMA_MAX_BATCH_SIZE", "NIM_MAX_NUM_SEQS"),
    ),
    Setting("queue_size", "requests that may wait", count, ("--queue-size",), variables=("DGEMMA_QUEUE_SIZE",)),
    Setting(
        "kv_memory_bytes",
        "memory for keys and values, at most",
        count,
        ("--kv-memory-bytes", "--kv-cache-memory-bytes"),
        variables=("DGEMMA_KV_MEMORY_BYTES",),
    ),
    _switch(
        "prefix_cache",
        "enable-prefix-caching",
        True,
        "keep what prompts have in common",
        variables=("NIM_ENABLE_KV_CACHE_REUSE",),
        off=("--no-prefix-cache",),
    ),
    _switch(
        "cuda_graphs",
        "cuda-graphs",
        True,
        "replay captured denoising steps, on a GPU",
        variables=("NIM_DISABLE_CUDA_GRAPH",),
        read_variable=inverse,
        off=("--enforce-eager",),
    ),
    Setting(
        "threads",
        "cores for an engine on the CPU; 0: all",
        count_or_none,
        ("--threads",),
        variables=("DGEMMA_THREADS",),
    ),
    Setting(
        "draft_model",
        "engine directory of a drafter, built for this model's engine",
        flags=("--draft-model",),
        variables=("NIM_DRAFT_MODEL_PATH",),
    ),
    Setting("host", "address that the front end listens on", flags=("--host",), default="0.0.0.0"),
    Setting(
        "server_port",
        "port of the OpenAI API",
        port,
        ("--port", "--server-port"),
        variables=("NIM_SERVER_PORT", "NIM_HTTP_API_PORT"),
        default=8000,
    ),
    Setting(
        "health_port",
        "port of its own for health and metrics",
        port,
        ("--health-port",),
        variables=("NIM_HEALTH_PORT",),
    ),
    _switch(
        "expose_triton",
        "expose-triton",
        False,
        "Triton's ports are reachable from other machines, without keys; off: on loopback",
        variables=("DGEMMA_EXPOSE_TRITON",),
    ),
    Setting("triton_grpc_port", "of Triton", port, ("--triton-grpc-port",), default=8001),
    Setting("triton_metrics_port", "of Triton", port, ("--triton-metrics-port",), default=8002),
    Setting("triton_http_port", "of Triton", port, ("--triton-http-port",), default=8003),
    Setting(
        "ssl_mode",
        "disabled, tls, or mtls (clients need a certificate too)",
        ssl_mode,
        ("--ssl-mode",),
        variables=("NIM_SSL_MODE",),
        default="disabled",
    ),
    Setting(
        "ssl_certificate",
        "server certificate, PEM",
        flags=("--ssl-certfile",),
        variables=("NIM_SSL_CERTS_PATH", "NIM_SSL_CERT_PATH"),
    ),
    Setting("ssl_key", "its key, PEM", flags=("--ssl-keyfile",), variables=("NIM_SSL_KEY_PATH",)),
    Setting(
        "ssl_client_ca",
        "authorities of clients, PEM; for mtls",
        flags=("--ssl-ca-certs",),
        variables=("NIM_SSL_CA_CERTS_PATH",),
    ),
    Setting(
        "cors_origins",
        "web pages of these origins may call; default: none",
        names,
        ("--allowed-origins", "--cors-origins"),
        variables=("NIM_CORS_ALLOW_ORIGINS",),
        default=(),
    ),
    Setting(
        "api_key_hashes",
        "file with SHA-256 hashes of API keys; without it nobody is asked for one",
        flags=("--api-key-hashes",),
        variables=("DGEMMA_API_KEY_HASHES",),
    ),
    Setting("max_body_bytes", "of a request", count, ("--max-body-bytes",), variables=("DGEMMA_MAX_BODY_BYTES",)),
    Setting(
        "requests_per_minute",
        "of one client; default: no limit",
        count,
        ("--requests-per-minute",),
        variables=("DGEMMA_REQUESTS_PER_MINUTE",),
    ),
    Setting("timeout_s", "of a request", seconds, ("--timeout-s",), variables=("DGEMMA_TIMEOUT_S",)),
    Setting(
        "drain_s",
        "seconds that running requests have after SIGTERM",
        count,
        ("--drain-s",),
        variables=("DGEMMA_DRAIN_S",),
        default=30,
    ),
    Setting(
        "start_timeout_s",
        "until Triton must be ready once it is started",
        seconds,
        ("--start-timeout-s",),
        variables=("DGEMMA_START_TIMEOUT_S",),
        default=1800.0,
    ),
    Setting(
        "log_level",
        "DEFAULT, TRACE, DEBUG, INFO, WARNING, ERROR or CRITICAL",
        log_level,
        ("--log-level",),
        variables=("NIM_LOG_LEVEL",),
        default="INFO",
    ),
    Setting(
        "log_format",
        "text, or json for one object per line",
        log_format,
        ("--log-format",),
        variables=("NIM_JSONL_LOGGING",),
        default="text",
        read_variable=jsonl,
    ),
    _switch(
        "log_prompts", "log-prompts", False, "prompts and answers may be logged", variables=("DGEMMA_LOG_PROMPTS",)
    ),
    _switch("playground", "playground", True, "the page for people at /", variables=("DGEMMA_PLAYGROUND",)),
    _switch("traces", "traces", False, "OpenTelemetry spans, as OTEL_* say", variables=("NIM_ENABLE_OTEL",)),
)

BY_NAME = {setting.name: setting for setting in SETTINGS}
