"""The project's own promises: locks, declared dependencies, import rules, packaging, commands and make targets.

Knows pyproject.toml, the lock files, the Makefile and the README; nothing of what the packages do.
"""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from dgemma_runtime.parameters import SUPPORTED

ROOT = Path(__file__).resolve().parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = {
    "dgemma_build": ROOT / "build/dgemma_build",
    "dgemma_client": ROOT / "clients/dgemma_client",
    "dgemma_nim": ROOT / "docker/dgemma_nim",
    "dgemma_openai": ROOT / "clients/dgemma_openai",
    "dgemma_runtime": ROOT / "python_backend/dgemma_runtime",
}
OUTSIDE_OF_THE_LOCK = {"torch"}  # its CPU build has another version and hash on every index
FROM_TRITON = {"triton_python_backend_utils", "c_python_backend_utils"}  # provided by the server, not by a package

# Which extras each package may import from: what the extra's users have installed.
EXTRAS = {
    "dgemma_build": {"build", "client", "serve", "oracle", "rtx", "bench", "kernels", "tensorrt", "otel", "test"},
    "dgemma_client": {"client"},
    "dgemma_nim": {"serve", "image"},
    "dgemma_openai": {"openai"},
    "dgemma_runtime": {"serve", "otel", "tensorrt"},
}


# ---------------------------------------------------------------- locks


@cache
def locked(name: str) -> dict[str, tuple[str, frozenset[str]]]:
    """Project -> (version, SHA-256 hashes) of a lock file."""
    text = (ROOT / name).read_text().replace("\\\n", " ")
    entries = {}
    for line in text.splitlines():
        if match := re.match(r"([a-z0-9.-]+)==(\S+)", line):
            assert match[1] not in entries, f"{name}: {match[1]} is locked twice"
            entries[match[1]] = (match[2], frozenset(re.findall(r"--hash=sha256:([0-9a-f]{64})\b", line)))
    return entries


def requirements(*extras: str) -> Iterator[Requirement]:
    """The project's direct requirements with these extras, references to its own extras followed."""
    declared = PROJECT["project"]["optional-dependencies"]
    lines = [*PROJECT["project"]["dependencies"], *(line for extra in extras for line in declared[extra])]
    for requirement in map(Requirement, lines):
        if requirement.name == PROJECT["project"]["name"]:
            yield from requirements(*requirement.extras)
        else:
            yield requirement


@pytest.mark.parametrize("name", ["demo.lock", "test.lock"])
def test_every_locked_package_has_hashes_and_no_location(name: str) -> None:
    assert len(locked(name)) > 20
    assert [project for project, (_, hashes) in locked(name).items() if not hashes] == []
    assert "://" not in (ROOT / name).read_text()


def test_the_demo_lock_is_a_subset_of_the_test_lock() -> None:
    assert {name: pin for name, pin in locked("demo.lock").items() if locked("test.lock").get(name) != pin} == {}


def test_the_demo_path_needs_no_torch() -> None:
    assert locked("demo.lock").keys() & {"torch", "transformers", "triton"} == set()


@pytest.mark.parametrize("extra", ["demo", "test"])
def test_the_locks_satisfy_pyproject(extra: str) -> None:
    pins = locked(f"{extra}.lock")
    for requirement in requirements(extra):
        name = canonicalize_name(requirement.name)
        if name not in OUTSIDE_OF_THE_LOCK:
            assert name in pins, f"{name} is not locked; run `make lock`"
            assert requirement.specifier.contains(pins[name][0]), (
                f"{requirement} against {pins[name][0]}; run `make lock`"
            )


# ---------------------------------------------------------------- imports


def third_party_imports(folder: Path) -> dict[str, str]:
    """Top-level module -> a file that imports it, for what is neither ours nor the standard library's."""
    found: dict[str, str] = {}
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            found |= {name.split(".")[0]: str(path.relative_to(ROOT)) for name in names}
    ours = sys.stdlib_module_names | PACKAGES.keys() | FROM_TRITON
    return {module: path for module, path in found.items() if module not in ours}


@pytest.mark.parametrize("package", PACKAGES)
def test_what_a_package_imports_is_declared(package: str) -> None:
    declared = {canonicalize_name(requirement.name) for requirement in requirements(*EXTRAS[package])}
    providers = importlib.metadata.packages_distributions()
    for module, path in third_party_imports(PACKAGES[package]).items():
        assert module in providers, f"{path} imports {module}, which no installed package provides"
        names = {canonicalize_name(name) for name in providers[module]}
        assert names & declared, f"{path} imports {module}; add {names} to one of the extras {EXTRAS[package]}"


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the import contracts of pyproject.toml on the packages that lie in `folder`."""
    return subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--config", ROOT / "pyproject.toml"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    for name, folder in PACKAGES.items():
        shutil.copytree(folder, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_the_import_rules_hold(sources: Path) -> None:
    result = lint_imports(sources)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("dgemma_runtime/sampler.py", "import torch"),
        ("dgemma_runtime/scheduler.py", "import onnxruntime"),
        ("dgemma_runtime/engines/tensorrt.py", "import cuda.bindings.runtime"),
        ("dgemma_runtime/engines/cuda.py", "import tensorrt_rtx"),
        ("dgemma_runtime/service.py", "import triton_python_backend_utils"),
        ("dgemma_runtime/service.py", "import opentelemetry.trace"),
        ("dgemma_runtime/contract.py", "import dgemma_client.errors"),
        ("dgemma_client/client.py", "import dgemma_runtime.errors"),
        ("dgemma_build/graph.py", "import dgemma_runtime.sampler"),
        ("dgemma_build/engine.py", "import dgemma_client"),
        ("dgemma_openai/app.py", "import tokenizers"),
        ("dgemma_nim/supervisor.py", "import dgemma_openai.app"),
    ],
)
def test_the_import_rules_catch(sources: Path, file: str, line: str) -> None:
    with (sources / file).open("a") as source:
        source.write(f"\n{line}\n")
    result = lint_imports(sources)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "1 broken" in " ".join(result.stdout.split())


# ---------------------------------------------------------------- packaging and commands


def test_the_wheel_holds_the_packages_and_nothing_else(tmp_path: Path) -> None:
    pip_wheel = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip_wheel, "--wheel-dir", tmp_path, ROOT], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {
        str(path.relative_to(folder.parent))
        for folder in PACKAGES.values()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == expected


@pytest.mark.parametrize("command", PROJECT["project"]["scripts"])
def test_every_command_explains_itself(command: str) -> None:
    script = Path(sys.executable).with_name(command)
    result = subprocess.run([script, "--help"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert {"dgemma-nim": "nim-serve"}.get(command, command) in result.stdout
    assert result.stderr == ""


def make(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(["make", *arguments], cwd=ROOT, env=environment | variables, capture_output=True, text=True)


def test_make_help_lists_every_target() -> None:
    phony = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    targets = {target for line in phony for target in line.split()}
    assert set(re.findall(r"^  make ([\w-]+) ", make("help").stdout, re.MULTILINE)) == targets


def test_the_documents_name_only_targets_that_exist() -> None:
    known = set(re.findall(r"^  make ([\w-]+) ", make("help").stdout, re.MULTILINE))
    for document in ("README.md", "ARCHITECTURE.md", "CHANGELOG.md", ".ci/run"):
        named = set(re.findall(r"(?:`|^)make ([a-z-]+)", (ROOT / document).read_text(), re.MULTILINE))
        assert named <= known, f"{document} names {named - known}"


def test_the_readme_names_only_server_settings_that_exist() -> None:
    rows = re.findall(r"^\| (`--.*?) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    named = {flag for row in rows for flag in re.findall(r"`(--[a-z-]+)`", row)}
    command = [str(Path(sys.executable).with_name("dgemma-server")), "run", "--help"]
    environment = os.environ | {"COLUMNS": "200", "NO_COLOR": "1"}
    shown = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout
    assert len(named) > 5
    assert named <= set(re.findall(r"--[a-z-]+", shown))


def test_the_readme_lists_every_request_parameter() -> None:
    table = re.findall(r"^\| (`.*?) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    named = {name for cell in table for name in re.findall(r"`(\w+)`", cell)}
    assert set(SUPPORTED) <= named


def test_every_test_file_is_collected() -> None:
    """Of tests/build none was, once: pytest leaves folders of that name out unless it is told otherwise."""
    command = [sys.executable, "-m", "pytest", "tests", "--collect-only", "-q"]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py")}
    assert {line.split("::")[0] for line in shown.splitlines() if "::" in line} == files


def test_ci_runs_the_readme_s_test_command() -> None:
    assert "\nmake test\n" in (ROOT / "README.md").read_text()
    assert os.access(ROOT / ".ci/run", os.X_OK)
    assert (ROOT / ".ci/run").read_text().endswith("\nmake check\nmake system-test\nmake test\n")


# ---------------------------------------------------------------- choice of Python


def fake_python(folder: Path, name: str, script: str) -> str:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def find_python(*candidates: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([ROOT / "build/tooling/find-python", *candidates], capture_output=True, text=True)


def test_a_shim_that_fails_is_passed_over(tmp_path: Path) -> None:
    shim = fake_python(tmp_path, "python3.12", "echo 'python3.12: command not found' >&2; exit 127")
    result = find_python(shim, sys.executable)
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).samefile(sys.executable)


def test_no_usable_python_is_an_error_that_says_why(tmp_path: Path) -> None:
    old = fake_python(tmp_path, "python3", "echo 'is 3.9.2' >&2; exit 1")
    result = find_python(old, str(tmp_path / "absent"))
    assert result.returncode == 1
    assert f"{old}: is 3.9.2" in result.stderr
    assert "absent" in result.stderr
    assert "Python 3.11 or 3.12" in result.stderr
