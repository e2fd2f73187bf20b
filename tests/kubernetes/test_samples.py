"""The samples for other engines: valid for the fields that are used, and in agreement with the chart and the image."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest

from dgemma_build.chart import helm, kinds
from dgemma_build.chart.cases import SAMPLES
from dgemma_build.chart.kinds import VERSIONS, Object

FOLDER = helm.ROOT / "docker/kubernetes"
NEWEST = VERSIONS[-1]


def sample(name: str, kind: str) -> Object:
    (found,) = [item for item in kinds.read_objects((FOLDER / name).read_text()) if item["kind"] == kind]
    return found


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_are_valid(path: Path, version: str) -> None:
    objects = kinds.read_objects(path.read_text())
    assert objects
    assert [error for item in objects for error in kinds.errors_of(item, version)] == []


def test_the_page_names_each_sample() -> None:
    page = (FOLDER / "README.md").read_text()
    assert set(re.findall(r"\[`([\w-]+\.yaml)`\]", page)) == {path.name for path in SAMPLES}


def test_the_pool_chooses_the_pods_of_the_chart() -> None:
    pool = sample("inference-pool.yaml", "InferencePool")["spec"]
    rendered = kinds.read_objects(helm.render(helm.ROOT / "tests/kubernetes/cases/defaults.yaml", "dgemma"))
    (workload,) = [item for item in rendered if item["kind"] == "StatefulSet"]
    template = workload["spec"]["template"]
    assert pool["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    ports = [each["containerPort"] for each in template["spec"]["containers"][0]["ports"]]
    assert [each["number"] for each in pool["targetPorts"]] == ports
    others = [item["metadata"]["labels"] for item in rendered if item["kind"] == "Pod"]
    assert others
    assert not any(pool["selector"]["matchLabels"].items() <= labels.items() for labels in others)


def test_the_route_leads_to_the_pool() -> None:
    (rule,) = sample("inference-pool.yaml", "HTTPRoute")["spec"]["rules"]
    (backend,) = rule["backendRefs"]
    pool = sample("inference-pool.yaml", "InferencePool")
    assert (backend["group"], backend["kind"], backend["name"]) == (
        pool["apiVersion"].partition("/")[0],
        pool["kind"],
        pool["metadata"]["name"],
    )


def test_kserve_finds_runtime_container_and_model() -> None:
    runtime, service = sample("kserve.yaml", "ClusterServingRuntime"), sample("kserve.yaml", "InferenceService")
    model = service["spec"]["predictor"]["model"]
    assert model["runtime"] == runtime["metadata"]["name"]
    (container,) = runtime["spec"]["containers"]
    assert container["name"] == "kserve-container"
    assert {"name": "NIM_CACHE_PATH", "value": "/mnt/models/cache"} in container["env"]
    assert [each["containerPort"] for each in container["ports"]] == [8000]
    (served,) = runtime["spec"]["supportedModelFormats"]
    assert model["modelFormat"] == {"name": served["name"], "version": served["version"]}


def test_the_operator_serves_what_it_has_cached() -> None:
    cache, service = sample("nim-operator.yaml", "NIMCache"), sample("nim-operator.yaml", "NIMService")
    image = service["spec"]["image"]
    assert cache["spec"]["source"]["ngc"]["modelPuller"] == f"{image['repository']}:{image['tag']}"
    assert service["spec"]["storage"]["nimCache"]["name"] == cache["metadata"]["name"]
    assert service["spec"]["env"] == cache["spec"]["env"]
    assert {cache["spec"]["userID"], service["spec"]["userID"]} == {1000}
    assert 'com.nvidia.nim.model_download_protocol="native-v1"' in (helm.ROOT / "docker/Dockerfile").read_text()


def changed(item: Object, path: str, value: Any) -> Object:
    """A copy with another value at a path."""
    found = copy.deepcopy(item)
    *parents, last = path.split(".")
    node: Any = found
    for key in parents:
        node = node[int(key)] if isinstance(node, list) else node[key]
    node[last] = value
    return found


@pytest.mark.parametrize(
    ("name", "kind", "path", "value"),
    [
        ("nim-operator.yaml", "NIMService", "spec.image.digest", "x"),
        ("nim-operator.yaml", "NIMService", "spec.replicas", "one"),
        ("nim-operator.yaml", "NIMService", "spec.resources.limit", {}),
        ("nim-operator.yaml", "NIMCache", "spec.storage.pvc.accessMode", "x"),
        ("kserve.yaml", "ClusterServingRuntime", "spec.containers.0.enviroment", []),
        ("kserve.yaml", "ClusterServingRuntime", "spec.containers.0.ports.0.port", 1),
        ("kserve.yaml", "InferenceService", "spec.predictor.model.storageUri", "engines"),
        ("inference-pool.yaml", "InferencePool", "spec.targetPortNumber", 8000),
        ("inference-pool.yaml", "InferencePool", "spec.endpointPickerRef.failureMode", "FailLoud"),
        ("inference-pool.yaml", "HTTPRoute", "spec.rules.0.backendRefs.0.ports", 1),
        ("inference-pool.yaml", "HTTPRoute", "metadata.lables", {}),
    ],
)
def test_a_mistake_is_seen(name: str, kind: str, path: str, value: Any) -> None:
    (error,) = kinds.errors_of(changed(sample(name, kind), path, value), NEWEST)
    assert error.startswith(f"{kind} dgemma")
    assert path.rpartition(".")[2] in error


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.replica", 1),
        ("spec.template.spec.containers.0.imagePullPolice", "Always"),
        ("spec.template.spec.containers.0.env.0.valu", "x"),
        ("spec.template.spec.containers.0.ports.0.containerPort", "8000"),
        ("spec.template.spec.terminationGracePeriodSeconds", "60"),
    ],
)
def test_a_mistake_in_a_rendered_object_is_seen(rendered: dict[str, list[Object]], path: str, value: Any) -> None:
    (workload,) = [item for item in rendered["defaults"] if item["kind"] == "StatefulSet"]
    (error,) = kinds.errors_of(changed(workload, path, value), NEWEST)
    assert error.startswith("StatefulSet demo-dgemma-nim: $.spec")


def test_an_unknown_kind_is_an_error() -> None:
    item = {"apiVersion": "example.com/v1", "kind": "Thing", "metadata": {"name": "a"}}
    assert kinds.errors_of(item, NEWEST) == ["Thing a: no schema of example.com/v1 for Kubernetes 1.37"]


def test_a_key_that_is_there_twice_is_an_error() -> None:
    with pytest.raises(ValueError, match="there twice: name"):
        kinds.read_objects("metadata:\n  name: a\n  name: b\n")
