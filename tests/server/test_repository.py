"""What Triton says of the served model: the facts that `dgemma-server` adds to its configuration."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

from dgemma_client import Client
from dgemma_runtime.contract import Manifest
from dgemma_runtime.repository import model_facts, stage_repository
from dgemma_runtime.server import RunningServer, running_server
from dgemma_runtime.server_process import default_model_repository
from dgemma_runtime.settings import RuntimeSettings

MODEL = "diffusion_gemma"


def shown(server: RunningServer) -> dict[str, str]:
    """The parameters of the model's configuration, over HTTP."""
    with urllib.request.urlopen(f"{server.http_url}/v2/models/{MODEL}/config", timeout=10) as answer:
        config: dict[str, Any] = json.load(answer)
    return {name: value["string_value"] for name, value in config["parameters"].items()}


def test_the_model_s_facts_are_in_its_configuration(server: RunningServer, engine: Path) -> None:
    facts = model_facts(Manifest.load(engine), RuntimeSettings())
    assert shown(server) == facts
    expected = {"max_model_len": "4096", "canvas_length": "16", "backend": "scripted", "checkpoint": "scripted"}
    assert expected.items() <= facts.items()
    assert {"precision": "fp32", "page_size": "64", "max_batch_size": "8"}.items() <= facts.items()


def test_a_client_sees_a_lowered_context(engine: Path) -> None:
    async def ask(url: str) -> dict[str, str]:
        async with Client(url) as client:
            return (await client.metadata()).parameters

    with running_server(engine, max_model_len=500, max_batch_size=2) as server:
        parameters = asyncio.run(ask(server.grpc_url))
    assert (parameters["max_model_len"], parameters["max_batch_size"]) == ("500", "2")


def test_a_name_that_needs_quoting_arrives_as_it_is(tmp_path: Path, engine: Path) -> None:
    name = 'Ädele "26B"\\a4b \N{SNOWMAN}'
    directory = tmp_path / "engine"
    directory.mkdir()
    for file in engine.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    replace(Manifest.load(directory), checkpoint=name).save(directory)
    with running_server(directory) as server:
        assert shown(server)["checkpoint"] == name


def test_the_repository_itself_is_left_alone(tmp_path: Path) -> None:
    source = default_model_repository()
    before = (source / MODEL / "config.pbtxt").read_text()
    staged = stage_repository(source, tmp_path / "models", MODEL, {"max_model_len": "7"})
    assert (source / MODEL / "config.pbtxt").read_text() == before
    copy = (staged / MODEL / "config.pbtxt").read_text()
    assert copy.startswith(before.rstrip())
    assert copy.endswith('parameters { key: "max_model_len" value: { string_value: "7" } }\n')
    assert (staged / MODEL / "1" / "model.py").read_text() == (source / MODEL / "1" / "model.py").read_text()
