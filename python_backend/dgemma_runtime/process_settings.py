"""What one serving process is started with: a JSON object in one environment variable. Knows no Triton and no engine.

    DGEMMA_SETTINGS='{"engine": "/engines/demo", "max_model_len": 8192, "max_batch_size": 4}'

`dgemma-server` writes it for the server that it starts; in a container it is set beside the model repository.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from dgemma_runtime.errors import ConfigurationError
from dgemma_runtime.settings import RuntimeSettings

SETTINGS_VARIABLE = "DGEMMA_SETTINGS"
LOG_FORMATS = ("text", "json")
_SWITCHES = {"warm_up": True, "traces": False}
_FILES = ("drain_file", "failure_file", "heartbeat_file")
_RUNTIME_NAMES = tuple(item.name for item in fields(RuntimeSettings))


@dataclass(frozen=True)
class ProcessSettings:
    """The engine directory, what to do at the start, and the runtime's settings."""

    engine: Path
    warm_up: bool = True  # run a short generation before the model is ready
    log_level: str = "INFO"  # of the runtime's own log on stderr
    log_format: str = "text"  # of the same: text, or json for one object per line
    traces: bool = False  # OpenTelemetry spans per request, exported as the OTEL_* variables say
    drain_file: Path | None = None  # when it appears: end all requests within the seconds in it, then remove it
    runtime: RuntimeSettings = field(default_factory=RuntimeSettings)
    failure_file: Path | None = None  # takes the reason where the model does not load, or its engine has failed
    heartbeat_file: Path | None = None  # its modification time shows that this process runs
    step_timeout_s: float = 120.0  # of one engine call; the first one of a kind may take ten times as long

    def to_json(self) -> str:
        """For `SETTINGS_VARIABLE`; `from_environment` reads it."""
        values = asdict(self)
        return json.dumps(values | values.pop("runtime"), default=str)

    @staticmethod
    def from_mapping(values: Mapping[str, Any]) -> ProcessSettings:
        """From names and values; raises ConfigurationError naming an unknown, missing or wrong one."""
        known = ("engine", *_SWITCHES, "log_level", "log_format", "step_timeout_s", *_FILES, *_RUNTIME_NAMES)
        for name in values:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
                raise ConfigurationError(f"unknown setting {name!r}; {hint}")
        engine = values.get("engine")
        level, log_format = values.get("log_level", "INFO"), values.get("log_format", LOG_FORMATS[0])
        if not isinstance(engine, str | Path) or not str(engine):
            raise ConfigurationError(f"engine must be the path of an engine directory, got {engine!r}")
        switches = {name: values.get(name, default) for name, default in _SWITCHES.items()}
        for name, value in switches.items():
            if not isinstance(value, bool):
                raise ConfigurationError(f"{name} must be true or false, got {value!r}")
        if level not in ("DEBUG", "INFO", "WARNING", "ERROR"):
            raise ConfigurationError(f"log_level must be DEBUG, INFO, WARNING or ERROR, got {level!r}")
        if log_format not in LOG_FORMATS:
            raise ConfigurationError(f"log_format must be {' or '.join(LOG_FORMATS)}, got {log_format!r}")
        timeout = values.get("step_timeout_s", ProcessSettings.step_timeout_s)
        if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout > 0:
            raise ConfigurationError(f"step_timeout_s must be a number of seconds above 0, got {timeout!r}")
        files: dict[str, Any] = {}
        for name in _FILES:
            path = values.get(name)
            if not isinstance(path, str | Path | None):
                raise ConfigurationError(f"{name} must be a path, got {path!r}")
            files[name] = None if path is None else Path(path)
        runtime = RuntimeSettings(**{name: values[name] for name in _RUNTIME_NAMES if name in values})
        log = {"log_level": level, "log_format": log_format}
        return ProcessSettings(Path(engine), runtime=runtime, step_timeout_s=timeout, **switches, **log, **files)

    def report_failure(self, reason: str) -> None:
        """Leave it to whoever started this process, and can say it without Triton's log around it."""
        if self.failure_file is not None:
            self.failure_file.write_text(reason)

    def beat(self) -> None:
        """For whoever watches this process from outside."""
        if self.heartbeat_file is not None:
            self.heartbeat_file.touch()

    def drain_request(self) -> float | None:
        """The seconds that whoever stops the server leaves to running requests; None where nobody is stopping it.

        Triton tells a model of its end only after the last request, and drops what outlives its exit timeout.
        """
        if self.drain_file is None:
            return None
        try:
            return float(self.drain_file.read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            return 0.0

    def drained(self) -> None:
        """Tell whoever asked for it that every request has its last response."""
        if self.drain_file is not None:
            self.drain_file.unlink(missing_ok=True)

    @staticmethod
    def from_environment(environment: Mapping[str, str]) -> ProcessSettings:
        """From `SETTINGS_VARIABLE`; raises ConfigurationError."""
        text = environment.get(SETTINGS_VARIABLE)
        example = f"""set it like {SETTINGS_VARIABLE}='{{"engine": "/path/of/an/engine"}}'"""
        if not text:
            raise ConfigurationError(f"{SETTINGS_VARIABLE} is not set; {example}")
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ConfigurationError(f"{SETTINGS_VARIABLE} is not valid JSON ({error}); {example}") from None
        if not isinstance(values, dict):
            raise ConfigurationError(
                f"{SETTINGS_VARIABLE} must be a JSON object, got {type(values).__name__}; {example}"
            )
        return ProcessSettings.from_mapping(values)
