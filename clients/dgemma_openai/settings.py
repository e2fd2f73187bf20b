"""The settings of one front end, checked once. Knows no request and no environment variable."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_KEY_LINE = re.compile(r"([0-9a-f]{64})(?:\s+(\S+))?")
MIB = 1 << 20


class SettingsError(Exception):
    """A setting that cannot be used; the message names it, its value and the remedy."""


@dataclass(frozen=True)
class ApiKey:
    """Who may ask: the SHA-256 of a key, never the key."""

    sha256: bytes
    name: str  # for logs and metrics


@dataclass(frozen=True)
class Settings:
    """Times in seconds, sizes in bytes. Raises SettingsError."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free one
    health_port: int | None = None  # health alone, without TLS and keys; None: no such port
    triton: str = "127.0.0.1:8001"  # gRPC
    triton_metrics: str | None = None  # a URL, whose metrics are shown with our own
    model: str = "diffusion_gemma"  # Triton's name of it
    served_model_names: tuple[str, ...] = ()  # the first is the one in answers; empty: `model`
    api_keys: tuple[ApiKey, ...] = ()  # empty: anybody may ask
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None  # clients need a certificate of this authority
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = 8 * MIB
    body_timeout_s: float = 30.0
    max_choices: int = 16  # answers of one request: prompts times n
    requests_per_minute: int | None = None  # of one key, or of one address; None: any number
    timeout_s: float = 3600.0  # of one generation
    keep_alive_s: float = 15.0  # between two signs of life on a stream
    drain_s: float = 30.0
    log_prompts: bool = False
    playground: bool = True

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "max_choices", "requests_per_minute"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise SettingsError(f"{name}: must be at least 1, got {value}")
        for name in ("body_timeout_s", "timeout_s", "keep_alive_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise SettingsError(f"{name}: must be a number of seconds above 0, got {getattr(self, name)}")
        if self.drain_s < 0:
            raise SettingsError(f"drain_s: must be at least 0 seconds, got {self.drain_s}")
        for name in ("port", "health_port"):
            if (value := getattr(self, name)) is not None and not 0 <= value < 65536:
                raise SettingsError(f"{name}: must be from 0 to 65535, got {value}")
        for name in ("tls_certificate", "tls_key", "tls_client_ca"):
            if (path := getattr(self, name)) is not None and not path.is_file():
                raise SettingsError(f"{name}: {path} is not a file")
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise SettingsError("tls_certificate and tls_key: one of them is missing; give both or none")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise SettingsError("tls_client_ca: needs tls_certificate and tls_key")
        if any(not name.strip() for name in self.names):
            raise SettingsError("served_model_names: one of them is empty")

    @property
    def names(self) -> tuple[str, ...]:
        """Under which requests may name the model."""
        return self.served_model_names or (self.model,)


def read_api_keys(path: Path) -> tuple[ApiKey, ...]:
    """A file with a line `SHA256 [NAME]` for each key; empty lines and lines that begin with # do not count."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"api_key_hashes: {path} is not readable ({error})") from None
    keys = []
    for number, line in enumerate(lines, 1):
        if not (text := line.strip()) or text.startswith("#"):
            continue
        if (found := _KEY_LINE.fullmatch(text)) is None:
            raise SettingsError(
                f"api_key_hashes: line {number} of {path} is not 64 hexadecimal digits and a name; "
                "`dgemma-openai hash-key` makes one"
            )
        keys.append(ApiKey(bytes.fromhex(found[1]), found[2] or f"key-{number}"))
    if not keys:
        raise SettingsError(f"api_key_hashes: {path} has no key; leave the option out to serve anybody")
    return tuple(keys)
