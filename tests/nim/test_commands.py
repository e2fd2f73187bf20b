"""The command lines of the container's processes are ones that those commands take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import typer
from typer.main import get_command

from dgemma_build.cli import app as build_app
from dgemma_nim.commands import build_command, front_end_command, server_command
from dgemma_nim.configuration import Configuration, resolve
from dgemma_nim.profiles import Profile, all_profiles
from dgemma_openai.cli import app as front_end_app
from dgemma_runtime.server import app as server_app


@pytest.fixture
def everything(tmp_path: Path) -> Configuration:
    """Every setting that reaches another process, at another value than the default."""
    for name in ("certificate", "key", "ca", "hashes"):
        (tmp_path / name).touch()
    words = ["--max-model-len", "4096", "--max-num-seqs", "2", "--queue-size", "3", "--kv-memory-bytes", "4096"]
    words += ["--no-prefix-cache", "--enforce-eager", "--threads", "1", "--host", "127.0.0.1", "--health-port", "9001"]
    words += ["--ssl-mode", "mtls", "--ssl-certfile", f"{tmp_path}/certificate", "--ssl-keyfile", f"{tmp_path}/key"]
    words += ["--ssl-ca-certs", f"{tmp_path}/ca", "--api-key-hashes", f"{tmp_path}/hashes", "--max-body-bytes", "99"]
    words += ["--served-model-name", "a", "b", "--cors-origins", "https://a.example", "--requests-per-minute", "7"]
    words += ["--timeout-s", "8", "--log-level", "debug", "--log-format", "json", "--log-prompts", "--no-playground"]
    return resolve([*words, "--traces", "--draft-model", str(tmp_path)], {}).configuration


def parsed(app: typer.Typer, command: list[str]) -> dict[str, object]:
    """What the command makes of its words; fails on one that it does not know."""
    name, *words = command
    found = get_command(app).commands[name]  # type: ignore[attr-defined]
    with found.make_context(name, words) as context:
        return dict(context.params)


def test_front_end(everything: Configuration) -> None:
    found = parsed(front_end_app, front_end_command(("serve",), everything))
    assert found["served_model_name"] == ["a", "b"]
    assert found["tls_client_ca"] is not None
    assert (found["triton"], found["triton_metrics"]) == ("127.0.0.1:8001", "http://127.0.0.1:8002/metrics")
    assert (found["health_port"], found["log_format"], found["playground"]) == (9001, "json", False)


def test_front_end_without_tls(everything: Configuration) -> None:
    found = parsed(front_end_app, front_end_command(("serve",), replace(everything, ssl_mode="disabled")))
    assert found["tls_certificate"] is None


def test_server_listens_on_loopback_only(everything: Configuration) -> None:
    found = parsed(server_app, server_command(("run",), everything, Path("/engine")))
    assert found["host"] == "127.0.0.1"
    assert (found["max_model_len"], found["max_batch_size"], found["threads"]) == (4096, 2, 1)
    assert (found["prefix_cache"], found["cuda_graphs"], found["traces"]) == (False, False, True)
    assert (found["exit_timeout"], str(found["draft_model"])) == (35, everything.draft_model)


def test_defaults_leave_the_servers_to_their_own() -> None:
    plain = resolve([], {}).configuration
    assert "--max-model-len" not in server_command(("run",), plain, Path("/engine"))
    assert "--max-body-bytes" not in front_end_command(("serve",), plain)


@pytest.mark.parametrize("profile", all_profiles(4096), ids=lambda profile: profile.tag)
def test_every_profile_is_one_that_the_exporter_is_asked_for(profile: Profile) -> None:
    found = parsed(build_app, build_command(("engine",), Path("/checkpoint"), profile, Path("/output")))
    assert (found["backend"], found["precision"], found["max_model_len"]) == (profile.backend, profile.precision, 4096)
