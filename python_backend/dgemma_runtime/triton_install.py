"""The Triton server inside of the nvidia-pytriton wheel, or one that is installed: checks that it runs here, stages its
backend, its environment.

Knows where each keeps what, nothing of engines or requests. Nothing of PyTriton's own Python code is used.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import re
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dgemma_runtime.errors import ConfigurationError

PACKAGE, VERSION = "nvidia-pytriton", "0.7.0"  # carries Triton 2.51.0, release 24.10
PYTHON_BACKEND_FILES = ("libtriton_python.so", "triton_python_backend_utils.py")
STUB = "triton_python_backend_stub"
ROOT_VARIABLE = "DGEMMA_TRITON_ROOT"  # of a server that is installed, as NVIDIA's image has one in /opt/tritonserver


@dataclass(frozen=True)
class TritonInstall:
    """What `find_triton` found, all of it present."""

    binary: Path
    backend: Path  # directory of PYTHON_BACKEND_FILES
    stub: Path  # for the running Python version
    libraries: Path  # shared libraries of the wheel

    def stage_backends(self, directory: Path) -> Path:
        """A directory for `--backend-directory`: the Python backend with the stub of this Python beside it."""
        backend = directory / "backends" / "python"
        backend.mkdir(parents=True)
        for file in (*(self.backend / name for name in PYTHON_BACKEND_FILES), self.stub):
            (backend / file.name).symlink_to(file)
        return backend.parent

    def environment(self, base: Mapping[str, str]) -> dict[str, str]:
        """Of the server process: the stub finds its libpython and the packages of the running environment."""
        environment = dict(base)
        _prepend(environment, "LD_LIBRARY_PATH", str(_libpython().parent), str(self.libraries))
        _prepend(environment, "PATH", str(Path(sys.executable).parent))
        return environment


def find_triton() -> TritonInstall:
    """Where `ROOT_VARIABLE` says, else in the wheel.

    Raises ConfigurationError naming what is missing or does not fit, and the remedy.
    """
    if named := os.environ.get(ROOT_VARIABLE):
        return installed_triton(Path(named))
    check_version(PACKAGE, VERSION)
    check_numpy(importlib.metadata.version("numpy"))
    site = Path(str(importlib.metadata.distribution(PACKAGE).locate_file("")))
    root = site / "pytriton" / "tritonserver"
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    install = TritonInstall(
        binary=root / "bin" / "tritonserver",
        backend=root / "backends" / "python",
        stub=root / "python_backend_stubs" / python / STUB,
        libraries=site / "nvidia_pytriton.libs",
    )
    needed = (install.binary, install.stub, install.libraries, *(install.backend / n for n in PYTHON_BACKEND_FILES))
    for path in needed:
        if not path.exists():
            raise ConfigurationError(
                f"{path}: missing from {PACKAGE} {VERSION} (Python {python}); "
                f"install it again with `pip install --no-deps --force-reinstall {PACKAGE}=={VERSION}`"
            )
    _libpython()
    return install


def installed_triton(root: Path) -> TritonInstall:
    """A server with its files where NVIDIA's image has them; raises ConfigurationError."""
    backend = root / "backends" / "python"
    install = TritonInstall(root / "bin" / "tritonserver", backend, backend / STUB, root / "lib")
    for path in (install.binary, install.stub, *(backend / name for name in PYTHON_BACKEND_FILES)):
        if not path.is_file():
            raise ConfigurationError(
                f"{ROOT_VARIABLE} is {str(root)!r}, which has no {path.relative_to(root)}; correct it, or unset it to "
                f"use the server of {PACKAGE}"
            )
    python = f"libpython{sys.version_info.major}.{sys.version_info.minor}."
    if python.encode() not in install.stub.read_bytes():
        raise ConfigurationError(
            f"{install.stub} was not built for this Python ({python}so); run this with the Python of that Triton, or "
            f"unset {ROOT_VARIABLE} to use the server of {PACKAGE}"
        )
    _libpython()
    return install


def check_version(package: str, expected: str) -> None:
    """Raises ConfigurationError unless exactly this version is installed."""
    remedy = f"run `pip install --no-deps {package}=={expected}`"
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise ConfigurationError(f"{package} is not installed, it carries the Triton server; {remedy}") from None
    if found != expected:
        raise ConfigurationError(f"{package} is {found}, this project was made for {expected}; {remedy}")


def check_numpy(version: str) -> None:
    """Raises ConfigurationError for numpy 2: with it, models load on this Triton and then fail at the first request."""
    if int(version.split(".")[0]) >= 2:
        raise ConfigurationError(
            f"numpy is {version}; the Python backend of Triton 24.10 needs numpy 1, run `pip install 'numpy<2'`"
        )


def _libpython() -> Path:
    """The shared libpython that the stub links against."""
    name = str(sysconfig.get_config_var("INSTSONAME"))
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    if not re.fullmatch(r"libpython.*\.so.*", name):  # this interpreter was linked statically
        name = f"libpython{version}.so.1.0"
    folders = [sysconfig.get_config_var("LIBDIR"), f"{sys.base_prefix}/lib"]
    if multiarch := sysconfig.get_config_var("MULTIARCH"):
        folders.append(f"/usr/lib/{multiarch}")
    for folder in folders:
        if folder and (path := Path(folder) / name).exists():
            return path
    try:
        ctypes.CDLL(name)  # somewhere on the loader's own path
    except OSError:
        raise ConfigurationError(
            f"{name} was not found (looked in {', '.join(str(f) for f in folders if f)}); Triton's Python backend "
            f"needs it: install libpython{version}, or use a Python built with --enable-shared"
        ) from None
    return Path("/usr/lib") / name


def _prepend(environment: dict[str, str], name: str, *entries: str) -> None:
    present = environment.get(name)
    environment[name] = os.pathsep.join([*entries, *([present] if present else [])])
