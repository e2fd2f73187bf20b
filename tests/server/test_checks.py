"""What is checked before a server starts and before its model loads: versions, files, settings."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dgemma_runtime import triton_install
from dgemma_runtime.errors import ConfigurationError
from dgemma_runtime.process_settings import SETTINGS_VARIABLE, ProcessSettings
from dgemma_runtime.settings import RuntimeSettings
from dgemma_runtime.triton_features import check_triton
from dgemma_runtime.triton_install import ROOT_VARIABLE, check_numpy, check_version, find_triton


class Response:
    """An InferenceResponse as of 24.10."""

    def __init__(self) -> None:
        """__init__(output_tensors: List[Tensor] = [], error: TritonError = None) -> None"""


class NewerResponse:
    def __init__(self) -> None:
        """__init__(output_tensors: list[Tensor] = [], error: TritonError = None, parameters: object = None) -> None"""


def pb_utils(**changes: Any) -> Any:
    """As of 24.10."""
    code = SimpleNamespace(INTERNAL=1, INVALID_ARG=2, UNAVAILABLE=3)
    request = SimpleNamespace(get_response_sender=1)
    values = {"Tensor": 1, "InferenceResponse": Response, "InferenceRequest": request, "TritonError": code}
    values |= {"TRITONSERVER_RESPONSE_COMPLETE_FINAL": 1, "unload_model": 1}
    return SimpleNamespace(**(values | changes))


# ---------------------------------------------------------------- inside of the model


def test_this_triton_with_numpy_1_and_a_newer_one_with_numpy_2() -> None:
    check_triton(pb_utils(), "1.26.4")
    check_triton(pb_utils(InferenceResponse=NewerResponse), "2.3.5")


def test_numpy_2_with_this_triton_is_refused() -> None:
    message = r"numpy is 2\.3\.5, and this Triton's Python backend was built for numpy 1; run `pip install 'numpy<2'`"
    with pytest.raises(ConfigurationError, match=message):
        check_triton(pb_utils(), "2.3.5")


def test_an_older_triton_is_refused() -> None:
    older = pb_utils(InferenceRequest=SimpleNamespace(), TritonError=SimpleNamespace(INTERNAL=1))
    del older.unload_model
    message = "has no InferenceRequest.get_response_sender, TritonError.INVALID_ARG, .*unload_model; use Triton 24.10"
    with pytest.raises(ConfigurationError, match=message):
        check_triton(older, "1.26.4")


# ---------------------------------------------------------------- before the start


def test_this_environment_can_serve() -> None:
    install = find_triton()
    assert os.access(install.binary, os.X_OK)
    assert f"/{sys.version_info.major}.{sys.version_info.minor}/" in str(install.stub)


def test_numpy_2_is_refused() -> None:
    check_numpy(np.__version__)
    with pytest.raises(ConfigurationError, match=r"numpy is 2\.0\.1; .*needs numpy 1, run `pip install 'numpy<2'`"):
        check_numpy("2.0.1")


def test_another_version_of_triton_is_refused() -> None:
    found = importlib.metadata.version("nvidia-pytriton")
    message = f"nvidia-pytriton is {found}, this project was made for 0.5.0; run `pip install --no-deps"
    with pytest.raises(ConfigurationError, match=message):
        check_version("nvidia-pytriton", "0.5.0")


def test_triton_is_not_installed() -> None:
    with pytest.raises(ConfigurationError, match="no-such-triton is not installed, it carries the Triton server; run"):
        check_version("no-such-triton", "1")


def test_a_missing_file_of_the_wheel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_install, "STUB", "no_such_stub")
    with pytest.raises(ConfigurationError, match=r"no_such_stub: missing from nvidia-pytriton 0\.7\.0"):
        find_triton()


def test_a_server_that_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the files of the wheel where NVIDIA's image has them."""
    wheel = find_triton()
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path))
    with pytest.raises(ConfigurationError, match=f"{ROOT_VARIABLE} is '{tmp_path}', which has no bin/tritonserver"):
        find_triton()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "tritonserver").symlink_to(wheel.binary)
    backend = tmp_path / "backends" / "python"
    backend.mkdir(parents=True)
    for name in triton_install.PYTHON_BACKEND_FILES:
        (backend / name).symlink_to(wheel.backend / name)
    (backend / triton_install.STUB).write_bytes(b"libpython2.7.so.1.0")
    with pytest.raises(ConfigurationError, match="was not built for this Python"):
        find_triton()
    (backend / triton_install.STUB).unlink()
    (backend / triton_install.STUB).symlink_to(wheel.stub)
    install = find_triton()
    assert (install.binary, install.libraries) == (tmp_path / "bin" / "tritonserver", tmp_path / "lib")
    assert {file.name for file in (install.stage_backends(tmp_path / "run") / "python").iterdir()} == {
        *triton_install.PYTHON_BACKEND_FILES,
        triton_install.STUB,
    }


def test_the_stub_finds_its_libraries(tmp_path: Path) -> None:
    install = find_triton()
    backends = install.stage_backends(tmp_path)
    environment = install.environment({"LD_LIBRARY_PATH": "/before", "PATH": "/usr/bin"})
    assert environment["PATH"] == f"{Path(sys.executable).parent}:/usr/bin"
    assert environment["LD_LIBRARY_PATH"].endswith(":/before")
    for file in (backends / "python").iterdir():
        if file.suffix == ".py":
            continue
        linked = subprocess.run(["ldd", file], capture_output=True, text=True, env=environment, check=True).stdout
        assert "not found" not in linked


# ---------------------------------------------------------------- settings


def test_settings_survive_the_environment() -> None:
    settings = ProcessSettings(
        Path("/engine"),
        warm_up=False,
        log_level="DEBUG",
        log_format="json",
        traces=True,
        drain_file=Path("/drain"),
        runtime=RuntimeSettings(max_model_len=100, threads=2),
        failure_file=Path("/why"),
        heartbeat_file=Path("/beat"),
        step_timeout_s=1.5,
    )
    assert ProcessSettings.from_environment({SETTINGS_VARIABLE: settings.to_json()}) == settings
    minimal = ProcessSettings.from_environment({SETTINGS_VARIABLE: '{"engine": "/engine"}'})
    assert minimal == ProcessSettings(Path("/engine"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, """DGEMMA_SETTINGS is not set; set it like DGEMMA_SETTINGS='{"engine":"""),
        ("{", "DGEMMA_SETTINGS is not valid JSON"),
        ("[]", "DGEMMA_SETTINGS must be a JSON object, got list"),
        ("{}", "engine must be the path of an engine directory, got None"),
        ('{"engine": ""}', "engine must be the path of an engine directory, got ''"),
        ('{"engine": "/e", "max_model_length": 5}', "unknown setting 'max_model_length'; did you mean max_model_len?"),
        ('{"engine": "/e", "xyz": 5}', "unknown setting 'xyz'; known are engine, warm_up"),
        ('{"engine": "/e", "max_batch_size": 0}', "max_batch_size must be an integer of at least 1, got 0"),
        ('{"engine": "/e", "warm_up": 1}', "warm_up must be true or false, got 1"),
        ('{"engine": "/e", "log_level": "LOUD"}', "log_level must be DEBUG, INFO, WARNING or ERROR, got 'LOUD'"),
        ('{"engine": "/e", "drain_file": 1}', "drain_file must be a path, got 1"),
        ('{"engine": "/e", "failure_file": 1}', "failure_file must be a path, got 1"),
        ('{"engine": "/e", "step_timeout_s": 0}', "step_timeout_s must be a number of seconds above 0, got 0"),
        ('{"engine": "/e", "step_timeout_s": true}', "step_timeout_s must be a number of seconds above 0, got True"),
    ],
)
def test_wrong_settings_are_named(text: str | None, message: str) -> None:
    environment = {} if text is None else {SETTINGS_VARIABLE: text}
    with pytest.raises(ConfigurationError) as caught:
        ProcessSettings.from_environment(environment)
    assert message in str(caught.value)


def test_a_drain_request_is_read(tmp_path: Path) -> None:
    settings = ProcessSettings(tmp_path, drain_file=tmp_path / "drain")
    assert ProcessSettings(tmp_path).drain_request() is None
    assert settings.drain_request() is None
    (tmp_path / "drain").write_text("2.5")
    assert settings.drain_request() == 2.5
    (tmp_path / "drain").write_text("soon")
    assert settings.drain_request() == 0
    ProcessSettings(tmp_path).drained()
    settings.drained()
    assert settings.drain_request() is None
    settings.drained()


def test_a_beat_can_be_seen(tmp_path: Path) -> None:
    settings = ProcessSettings(tmp_path, heartbeat_file=tmp_path / "beat")
    ProcessSettings(tmp_path).beat()
    assert not (tmp_path / "beat").exists()
    seen = set()
    for _ in range(3):
        settings.beat()
        seen.add((tmp_path / "beat").stat().st_mtime_ns)
        time.sleep(0.02)
    assert len(seen) == 3
