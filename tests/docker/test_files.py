"""The Dockerfile, the compose file and what they refer to, as text: what a reader of them relies on."""

from __future__ import annotations

import fnmatch
import json
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import yaml

from dgemma_nim.variables import KNOWN

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
DOCKERFILE = DOCKER / "Dockerfile"


@pytest.fixture(scope="module")
def instructions() -> list[tuple[str, str]]:
    """Name and text of each instruction, without comments and line breaks."""
    lines = "\n".join(line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", "", lines)
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in joined.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    return loaded


def test_lint() -> None:
    hadolint = Path(sysconfig.get_path("scripts"), "hadolint")
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_targets(instructions: list[tuple[str, str]]) -> None:
    stages = [text.split(" AS ")[1] for name, text in instructions if name == "FROM"]
    assert {"build", "serve", "gateway"} <= set(stages)
    assert stages[-1] == "serve", "a build without --target is the one that serves"
    assert ("ARG", "BASE_IMAGE=docker.io/library/python:3.12-slim-bookworm") in instructions


def test_every_command_is_in_exec_form_and_none_is_a_shell(instructions: list[tuple[str, str]]) -> None:
    commands = [(name, text) for name, text in instructions if name in ("RUN", "CMD", "ENTRYPOINT", "HEALTHCHECK")]
    assert len(commands) > 8
    for name, text in commands:
        words = json.loads(text[text.index("[") :])
        assert not words or Path(words[0]).name not in ("sh", "bash"), f"{name} {text}"


def test_what_runs_is_not_root(instructions: list[tuple[str, str]]) -> None:
    by_stage: dict[str, list[tuple[str, str]]] = {}
    for name, text in instructions:
        if name == "FROM":
            current = by_stage.setdefault(text.split(" AS ")[1], [("FROM", text.split()[0])])
        elif by_stage:
            current.append((name, text))
    for target in ("build", "serve", "gateway"):
        line, stage = [], target
        while stage in by_stage:
            line += by_stage[stage]
            stage = next(text for name, text in by_stage[stage] if name == "FROM")
        assert ("USER", "1000:1000") in line
        assert ("STOPSIGNAL", "SIGTERM") in line
        label = 'com.nvidia.nim.model_download_protocol="native-v1"'
        assert any(name == "LABEL" and label in text for name, text in line) == (target == "serve")


def test_what_is_copied_is_let_through_and_nothing_else_is_there(instructions: list[tuple[str, str]]) -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = set()
    for name, text in instructions:
        if name == "COPY" and not text.startswith("--from"):
            copied |= set(text.split()[:-1])
    for path in copied:
        assert (ROOT / path).exists(), path
        assert any(fnmatch.fnmatch(path, rule) or path.startswith(rule + "/") for rule in allowed), path
    assert set(allowed) == copied
    assert "*" in (ROOT / ".dockerignore").read_text().splitlines()


@pytest.mark.parametrize("lock", ["serve.lock", "gateway.lock"])
def test_locks_have_a_hash_for_every_package(lock: str) -> None:
    text = (ROOT / lock).read_text()
    packages = re.findall(r"^([a-z0-9._-]+)==", text, re.MULTILINE)
    assert len(packages) == len(set(packages)) > 20
    for entry in re.split(r"\n(?=[a-z0-9])", text[text.index("==") :]):
        assert "--hash=sha256:" in entry, entry[:60]
    tested = dict(re.findall(r"^([a-z0-9._-]+)==([^ ]+)", (ROOT / "test.lock").read_text(), re.MULTILINE))
    found = dict(re.findall(r"^([a-z0-9._-]+)==([^ ]+)", text, re.MULTILINE))
    assert {name: found[name] for name in found if name in tested} == {
        name: tested[name] for name in found if name in tested
    }


def test_compose_binds_to_loopback_only(compose: dict[str, Any]) -> None:
    assert set(compose["services"]) == {"serve", "prometheus", "grafana"}
    for name, service in compose["services"].items():
        assert service["ports"], name
        for port in service["ports"]:
            assert isinstance(port, str)
            assert port.startswith("127.0.0.1:"), f"{name}: {port}"
            assert port.count(":") == 2 + port.count(":-"), f"{name}: {port}"


def test_compose_names_only_what_is_there(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        assert set(service) <= {
            *("image", "build", "environment", "volumes", "ports", "user", "read_only", "tmpfs", "shm_size", "command"),
            *("cap_drop", "security_opt", "stop_grace_period", "restart", "depends_on"),
        }, name
        for volume in service["volumes"]:
            source = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", volume).split(":")[0]
            assert (DOCKER / source).exists() if source.startswith(".") else source in compose["volumes"], volume
        assert re.search(r":v?\d", service["image"]) or name == "serve", "a version of its own"
    for each in compose["services"]["grafana"]["depends_on"]:
        assert each in compose["services"]


def test_compose_serves_as_the_image_expects(compose: dict[str, Any]) -> None:
    serve = compose["services"]["serve"]
    assert (DOCKER / serve["build"]["context"]).resolve() == ROOT
    assert (ROOT / serve["build"]["dockerfile"]) == DOCKERFILE
    assert serve["build"]["target"] == "serve"
    assert set(serve["environment"]) <= KNOWN
    assert serve["user"] == "1000:1000"
    assert serve["read_only"] is True
    assert serve["tmpfs"] == ["/tmp"]
    assert serve["cap_drop"] == ["ALL"]


def test_prometheus_asks_the_server_and_grafana_asks_prometheus(compose: dict[str, Any]) -> None:
    config = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yaml").read_text())
    (job,) = config["scrape_configs"]
    assert job["metrics_path"] == "/metrics"
    assert job["static_configs"] == [{"targets": ["serve:8000"]}]
    assert "--config.file=/etc/prometheus/prometheus.yaml" in compose["services"]["prometheus"]["command"]
    grafana = compose["services"]["grafana"]
    assert grafana["environment"]["PROMETHEUS_URL"] == "http://prometheus:9090"
    provider = yaml.safe_load((DOCKER / "grafana/provisioning/dashboards/dgemma.yaml").read_text())["providers"][0]
    mounted = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert mounted == f"{provider['options']['path']}/dgemma.json"
    assert f"./grafana/dgemma.json:{mounted}:ro" in grafana["volumes"]


def test_shell_scripts_are_clean() -> None:
    tools = [path for path in (ROOT / "build/tooling").iterdir() if path.read_text().startswith("#!/bin/sh")]
    scripts = [*tools, ROOT / ".ci/run"]
    assert len(tools) >= 2
    shellcheck = shutil.which("shellcheck", path=sysconfig.get_path("scripts"))
    assert shellcheck is not None
    done = subprocess.run([shellcheck, *scripts], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_image_check_is_clean() -> None:
    script = ROOT / "build/tooling/check-image"
    for words in (["check"], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *words, str(script)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
