"""One configuration out of command line, variables and files, with the origin of every value.

From the strongest to the weakest: command line, NIM_PASSTHROUGH_ARGS, environment, runtime_config.json, profile,
default. Pure but for reading `runtime_config.json`; knows no process and no model.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NoReturn

from dgemma_nim.settings import BY_NAME, SETTINGS, Setting
from dgemma_nim.variables import notes_on
from dgemma_runtime.errors import ConfigurationError

RUNTIME_CONFIG = "runtime_config.json"
_FLAG_OF_A_KEY = "--api-key"


@dataclass(frozen=True)
class Configuration:
    """What a container does; the table in `settings.py` says what each value means."""

    model: str | None
    model_profile: str | None
    cache_path: str
    download: bool
    download_only: bool
    served_model_names: tuple[str, ...]
    max_model_len: int | None  # tokens; None until a profile or an engine says it
    max_batch_size: int | None
    queue_size: int | None
    kv_memory_bytes: int | None
    prefix_cache: bool
    cuda_graphs: bool
    threads: int | None
    draft_model: str | None
    host: str
    server_port: int
    health_port: int | None
    expose_triton: bool
    triton_grpc_port: int
    triton_metrics_port: int
    triton_http_port: int
    ssl_mode: str
    ssl_certificate: str | None
    ssl_key: str | None
    ssl_client_ca: str | None
    cors_origins: tuple[str, ...]
    api_key_hashes: str | None
    max_body_bytes: int | None
    requests_per_minute: int | None
    timeout_s: float | None
    drain_s: int
    start_timeout_s: float
    log_level: str
    log_format: str
    log_prompts: bool
    playground: bool
    traces: bool

    def __post_init__(self) -> None:
        self._check_ports()
        self._check_tls()

    def _check_ports(self) -> None:
        names = ("server_port", "health_port", "triton_grpc_port", "triton_metrics_port", "triton_http_port")
        owners: dict[int, str] = {}
        for name in names:
            if (number := getattr(self, name)) is None:
                continue
            if number in owners:
                raise ConfigurationError(f"{name} and {owners[number]} are both {number}; change one of them")
            owners[number] = name

    def _check_tls(self) -> None:
        if self.ssl_mode == "disabled":
            return
        needed = {"ssl_certificate": "NIM_SSL_CERTS_PATH", "ssl_key": "NIM_SSL_KEY_PATH"}
        if self.ssl_mode == "mtls":
            needed["ssl_client_ca"] = "NIM_SSL_CA_CERTS_PATH"
        for name, variable in needed.items():
            path = getattr(self, name)
            if path is None:
                raise ConfigurationError(f"ssl_mode is {self.ssl_mode!r} and {name} is not set; set {variable}")
            if not Path(path).is_file():
                raise ConfigurationError(f"{name} is {path!r}, which is not a file; mount it or correct {variable}")


@dataclass(frozen=True)
class Resolved:
    """A configuration, where each value came from, and lines for the log."""

    configuration: Configuration
    origins: Mapping[str, str]
    notes: tuple[str, ...] = ()

    def with_value(self, name: str, value: Any, origin: str) -> Resolved:
        changed = replace(self.configuration, **{name: value})
        return replace(self, configuration=changed, origins={**self.origins, name: origin})

    def rows(self) -> list[tuple[str, str, str]]:
        """Setting, value and origin, for a person; a secret is not among the settings."""
        return [
            (item.name, _shown(getattr(self.configuration, item.name)), self.origins[item.name])
            for item in fields(self.configuration)
        ]

    def values(self) -> dict[str, dict[str, Any]]:
        """The same for JSON."""
        return {
            item.name: {"value": getattr(self.configuration, item.name), "from": self.origins[item.name]}
            for item in fields(self.configuration)
        }


def resolve(arguments: Sequence[str], environment: Mapping[str, str]) -> Resolved:
    """All but the profile; raises ConfigurationError naming what cannot be used, its value and the remedy."""
    notes = list(notes_on(environment))
    layers = [_given(arguments, "command line"), _passed_through(environment), _from_environment(environment)]
    first = {name: given for layer in reversed(layers) for name, given in layer.items()}
    file = _runtime_config(environment, first)
    layers.append(_from_file(file) if file else {})
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for setting in SETTINGS:
        source = next((layer for layer in layers if setting.name in layer), None)
        values[setting.name], origins[setting.name] = (
            source[setting.name] if source is not None else (setting.default, "default")
        )
    configuration = Configuration(**values)
    if configuration.ssl_mode == "disabled" and configuration.ssl_certificate:
        notes.append("a certificate is given, but NIM_SSL_MODE is disabled: connections are not encrypted")
    return Resolved(configuration, origins, tuple(notes))


# ---------------------------------------------------------------- layers


_Layer = dict[str, tuple[Any, str]]  # name -> value and where it stands


class Parser(argparse.ArgumentParser):
    """Raises ConfigurationError instead of exiting."""

    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{message}; --help lists the options")


def parser(*parents: argparse.ArgumentParser, **more: Any) -> argparse.ArgumentParser:
    """For command lines and NIM_PASSTHROUGH_ARGS: what was given, as text; nothing stands for what was not."""
    made = Parser(parents=parents, allow_abbrev=False, argument_default=argparse.SUPPRESS, **more)
    for setting in SETTINGS:
        if setting.is_switch:
            made.add_argument(*setting.flags, dest=setting.name, action="store_const", const="1", help=setting.meaning)
            made.add_argument(*setting.off, dest=setting.name, action="store_const", const="0", help=argparse.SUPPRESS)
        elif setting.flags:
            many: dict[str, Any] = {"nargs": "+", "action": "extend"} if setting.default == () else {}
            made.add_argument(*setting.flags, dest=setting.name, metavar="VALUE", help=setting.meaning, **many)
    return made


def _given(arguments: Sequence[str], source: str) -> _Layer:
    if any(word.split("=")[0] == _FLAG_OF_A_KEY for word in arguments):
        raise ConfigurationError(
            f"{_FLAG_OF_A_KEY} ({source}): other processes can read a command line; put SHA-256 hashes of the keys "
            "into a file (`dgemma-openai hash-key`) and name it with --api-key-hashes"
        )
    found, unknown = parser(add_help=False).parse_known_args(list(arguments))
    if unknown:
        flags = ", ".join(word.split("=")[0] for word in unknown if word.startswith("-")) or "an argument"
        raise ConfigurationError(f"{flags} ({source}): there is no such option; `nim-serve --help` lists them")
    layer: _Layer = {}
    for name, text in vars(found).items():
        setting = BY_NAME[name]
        joined = ",".join(text) if isinstance(text, list) else text
        layer[name] = setting.value(f"{setting.flags[0]} ({source})", joined), source
    return layer


def _passed_through(environment: Mapping[str, str]) -> _Layer:
    try:
        words = shlex.split(environment.get("NIM_PASSTHROUGH_ARGS", ""))
    except ValueError as error:
        raise ConfigurationError(
            f"NIM_PASSTHROUGH_ARGS cannot be split into words ({error}); close the quote"
        ) from None
    return _given(words, "NIM_PASSTHROUGH_ARGS")


def _from_environment(environment: Mapping[str, str]) -> _Layer:
    layer: _Layer = {}
    for setting in SETTINGS:
        for variable in setting.variables:
            if (text := environment.get(variable, "").strip()) and setting.name not in layer:
                layer[setting.name] = setting.value(variable, text, variable=True), variable
    return layer


def _runtime_config(environment: Mapping[str, str], given: _Layer) -> Path | None:
    """The file that NIM_RUNTIME_CONFIG names, else the one beside the model, else the one in the cache."""
    if named := environment.get("NIM_RUNTIME_CONFIG", "").strip():
        if not Path(named).is_file():
            raise ConfigurationError(f"NIM_RUNTIME_CONFIG is {named!r}, which is not a file; mount it or unset it")
        return Path(named)
    model, _ = given.get("model", (None, ""))
    cache, _ = given.get("cache_path", (BY_NAME["cache_path"].default, ""))
    folders = [Path(folder) for folder in (model, cache) if folder and "://" not in folder]
    return next((path for folder in folders if (path := folder / RUNTIME_CONFIG).is_file()), None)


def _from_file(path: Path) -> _Layer:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path}: not readable as JSON ({error}); correct or remove it") from None
    if not isinstance(values, dict):
        raise ConfigurationError(f"{path}: must be a JSON object of settings, is a {type(values).__name__}")
    layer: _Layer = {}
    for key, value in values.items():
        setting = BY_NAME.get(key.replace("-", "_"))
        if setting is None or not setting.in_file:
            allowed = ", ".join(each.name for each in SETTINGS if each.in_file)
            raise ConfigurationError(f"{path}: {key!r} cannot be set here; what can be is {allowed}")
        layer[setting.name] = setting.value(f"{key} in {path}", _as_text(setting, key, value, path)), path.name
    return layer


def _as_text(setting: Setting, key: str, value: Any, path: Path) -> str:
    """A JSON value as it would stand on a command line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if setting.default == () and isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ",".join(value)
    if isinstance(value, str | int | float):
        return str(value)
    raise ConfigurationError(f"{path}: {key} is {value!r}; it must be a string, a number, true or false")


def _shown(value: Any) -> str:
    if value is None or value == ():
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(value) if isinstance(value, tuple) else str(value)
