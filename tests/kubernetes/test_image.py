"""The environment that chart and samples set is one that the image understands, and means there what it says here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dgemma_build.chart import helm
from dgemma_build.chart.cases import SAMPLES
from dgemma_build.chart.kinds import Object, read_objects, walk
from dgemma_nim.commands import server_command
from dgemma_nim.configuration import Configuration, resolve
from dgemma_nim.settings import SETTINGS
from dgemma_nim.variables import KNOWN

OF_OTHERS = {"HOME", "HF_HOME", "POD_NAME", "API_KEY"}
KNOWN_HERE = KNOWN | OF_OTHERS | {name for setting in SETTINGS for name in setting.variables}


def environments(objects: list[Object]) -> Iterator[dict[str, Any]]:
    """Of every container."""
    for value in walk(objects):
        if isinstance(value, dict) and isinstance(value.get("env"), list):
            yield {each["name"]: each.get("value") for each in value["env"]}


def configuration(objects: list[Object]) -> Configuration:
    """What the server's container makes of its environment and arguments."""
    (workload,) = [item for item in objects if item["kind"] in ("StatefulSet", "Deployment")]
    (container,) = workload["spec"]["template"]["spec"]["containers"]
    (environment,) = environments([container])
    values = {name: value for name, value in environment.items() if value is not None and name != "NIM_RUNTIME_CONFIG"}
    return resolve(container.get("args", ["nim-serve"])[1:], values).configuration


def test_every_variable_of_the_chart_is_known(objects: list[Object]) -> None:
    assert {name for each in environments(objects) for name in each} <= KNOWN_HERE


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_every_variable_of_a_sample_is_known(path: Path) -> None:
    assert {name for each in environments(read_objects(path.read_text())) for name in each} <= KNOWN_HERE


def test_values_arrive(rendered: dict[str, list[Object]]) -> None:
    cpu = configuration(rendered["cpu"])
    assert (cpu.model, cpu.model_profile) == ("/model-store/checkpoint", "onnxruntime-int8-cpu-8192")
    assert (cpu.max_model_len, cpu.served_model_names) == (8192, ("diffusion-gemma-demo",))
    assert (cpu.log_level, cpu.log_format, cpu.threads) == ("DEBUG", "text", 4)
    job = configuration(rendered["engine-job"])
    assert (job.server_port, job.health_port, job.model) == (9000, 9080, "hf://example/diffusiongemma-26b")
    assert (job.expose_triton, job.cache_path) == (True, "/model-store")
    patient = configuration(rendered["host-path"])
    assert patient.drain_s == 120
    assert configuration(rendered["nfs"]).download is False
    assert configuration(rendered["claim-per-pod"]).cache_path == "/opt/nim/.cache"


def test_triton_listens_where_the_service_leads(rendered: dict[str, list[Object]]) -> None:
    for name, host in (("engine-job", "0.0.0.0"), ("defaults", "127.0.0.1")):
        words = server_command(("dgemma-server", "run"), configuration(rendered[name]), Path("/engine"))
        assert words[words.index("--host") + 1] == host
        assert words[words.index("--grpc-port") + 1] == "8001"
        assert words[words.index("--metrics-port") + 1] == "8002"


def test_defaults_are_the_images_own(rendered: dict[str, list[Object]]) -> None:
    ours, image = configuration(rendered["defaults"]), resolve([], {}).configuration
    for name in ("server_port", "drain_s", "log_level", "health_port", "ssl_mode", "api_key_hashes", "expose_triton"):
        assert getattr(ours, name) == getattr(image, name), name


def test_keys_and_certificate(tmp_path: Path, rendered: dict[str, list[Object]]) -> None:
    """The files are mounted where the variables say; here they are moved into a folder of the test."""
    (values, *_) = [each for each in environments(rendered["secure"]) if "NIM_SSL_MODE" in each]
    moved = {name: value for name, value in values.items() if value is not None}
    for name in ("NIM_SSL_CERTS_PATH", "NIM_SSL_KEY_PATH"):
        moved[name] = str(tmp_path / Path(moved[name]).name)
        Path(moved[name]).write_text("PEM")
    found = resolve([], moved).configuration
    assert (found.ssl_mode, found.api_key_hashes) == ("tls", "/etc/dgemma/api-keys/keys.txt")
    assert found.ssl_certificate == str(tmp_path / "tls.crt")
    assert found.ssl_key == str(tmp_path / "tls.key")


def test_a_build_builds(rendered: dict[str, list[Object]]) -> None:
    builds = [
        each
        for objects in rendered.values()
        for each in environments(objects)
        if "NIM_ENGINE_MODEL_DOWNLOAD_ONLY" in each
    ]
    assert len(builds) == 3
    for each in builds:
        found = resolve([], {name: value for name, value in each.items() if value is not None}).configuration
        assert found.download_only is True
        assert found.ssl_mode == "disabled"


def test_users_and_ports_are_those_of_the_image() -> None:
    dockerfile = (helm.ROOT / "docker/Dockerfile").read_text()
    assert "USER 1000:1000" in dockerfile
    assert "EXPOSE 8000" in dockerfile
