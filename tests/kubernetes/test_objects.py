"""What the rendered objects are to each other: labels, ports, probes, storage, secrets, the end of a pod."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dgemma_build.chart import helm
from dgemma_build.chart.kinds import Object, read_objects, walk

SECRETS = {"nvapi-", "hf_", "-----BEGIN"}
FIRST_PORTS = {"http-openai": 8000, "grpc": 8001, "triton-metrics": 8002}


def of_kind(objects: list[Object], *kinds: str) -> list[Object]:
    return [item for item in objects if item["kind"] in kinds]


def workload(objects: list[Object]) -> Object:
    (found,) = of_kind(objects, "StatefulSet", "Deployment")
    return found


def pod_spec(objects: list[Object]) -> dict[str, Any]:
    spec: dict[str, Any] = workload(objects)["spec"]["template"]["spec"]
    return spec


def server(objects: list[Object]) -> dict[str, Any]:
    (container,) = pod_spec(objects)["containers"]
    found: dict[str, Any] = container
    return found


def environment(container: dict[str, Any]) -> dict[str, Any]:
    return {each["name"]: each.get("value", each.get("valueFrom")) for each in container["env"]}


def pod_specs(objects: list[Object]) -> list[dict[str, Any]]:
    """Of the workload, the Job and the test pods."""
    templates = [item["spec"]["template"]["spec"] for item in of_kind(objects, "StatefulSet", "Deployment", "Job")]
    return templates + [item["spec"] for item in of_kind(objects, "Pod")]


def containers(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [*spec.get("initContainers", []), *spec["containers"]]


def selects(selector: dict[str, str], labels: dict[str, str]) -> bool:
    return selector.items() <= labels.items()


def test_selectors_choose_the_servers_and_no_other_pod(objects: list[Object]) -> None:
    servers = workload(objects)["spec"]["template"]["metadata"]["labels"]
    others = [item["spec"]["template"]["metadata"]["labels"] for item in of_kind(objects, "Job")]
    others += [item["metadata"]["labels"] for item in of_kind(objects, "Pod")]
    selectors = [workload(objects)["spec"]["selector"]["matchLabels"]]
    selectors += [item["spec"]["selector"] for item in of_kind(objects, "Service")]
    selectors += [item["spec"]["selector"]["matchLabels"] for item in of_kind(objects, "PodDisruptionBudget")]
    selectors += [item["spec"]["podSelector"]["matchLabels"] for item in of_kind(objects, "NetworkPolicy")]
    for selector in selectors:
        assert selects(selector, servers)
        assert not any(selects(selector, labels) for labels in others)


def test_the_headless_service_is_the_one_that_the_set_names(objects: list[Object]) -> None:
    headless = [item for item in of_kind(objects, "Service") if item["spec"].get("clusterIP") == "None"]
    if workload(objects)["kind"] == "StatefulSet":
        assert [item["metadata"]["name"] for item in headless] == [workload(objects)["spec"]["serviceName"]]
    else:
        assert headless == []


def test_a_monitor_chooses_one_service_and_a_port_of_it(rendered: dict[str, list[Object]]) -> None:
    seen = 0
    for objects in rendered.values():
        for monitor in of_kind(objects, "ServiceMonitor"):
            selector = monitor["spec"]["selector"]["matchLabels"]
            (chosen,) = [item for item in of_kind(objects, "Service") if selects(selector, item["metadata"]["labels"])]
            assert {each["port"] for each in monitor["spec"]["endpoints"]} <= {
                each["name"] for each in chosen["spec"]["ports"]
            }
            assert chosen["spec"].get("clusterIP") != "None"
            seen += 1
    assert seen >= 2


def test_an_ingress_leads_to_a_port_of_the_service(rendered: dict[str, list[Object]]) -> None:
    (ingress,) = of_kind(rendered["secure"], "Ingress")
    for rule in ingress["spec"]["rules"]:
        for path in rule["http"]["paths"]:
            backend = path["backend"]["service"]
            (service,) = [
                item for item in of_kind(rendered["secure"], "Service") if item["metadata"]["name"] == backend["name"]
            ]
            assert backend["port"]["name"] in [each["name"] for each in service["spec"]["ports"]]


def test_services_and_probes_use_named_ports_of_the_container(objects: list[Object]) -> None:
    named = {each["name"] for each in server(objects)["ports"]}
    for service in of_kind(objects, "Service"):
        assert {each["targetPort"] for each in service["spec"]["ports"]} <= named
    for name in ("startupProbe", "livenessProbe", "readinessProbe"):
        probe = server(objects).get(name, {})
        if "httpGet" in probe:
            assert probe["httpGet"]["port"] in named
            assert probe["timeoutSeconds"] >= 1


def test_default_probes_are_those_of_nims(rendered: dict[str, list[Object]]) -> None:
    container = server(rendered["defaults"])
    paths = {name: container[name]["httpGet"]["path"] for name in ("startupProbe", "livenessProbe", "readinessProbe")}
    ready = "/v1/health/ready"
    assert paths == {"startupProbe": ready, "livenessProbe": "/v1/health/live", "readinessProbe": ready}
    assert {container[name]["timeoutSeconds"] for name in paths} == {1}


def test_the_policy_admits_what_the_service_exposes_and_nothing_else(objects: list[Object]) -> None:
    policies = of_kind(objects, "NetworkPolicy")
    exposed = {each["targetPort"] for item in of_kind(objects, "Service") for each in item["spec"]["ports"]}
    for policy in policies:
        (rule,) = policy["spec"]["ingress"]
        assert {each["port"] for each in rule["ports"]} == exposed


def test_the_policy_admits_the_test_pods(rendered: dict[str, list[Object]]) -> None:
    (policy,) = of_kind(rendered["secure"], "NetworkPolicy")
    peers = [
        each["podSelector"]["matchLabels"] for each in policy["spec"]["ingress"][0]["from"] if "podSelector" in each
    ]
    for pod in of_kind(rendered["secure"], "Pod"):
        assert any(selects(peer, pod["metadata"]["labels"]) for peer in peers)


def test_the_environment_agrees_with_ports_and_mounts(objects: list[Object]) -> None:
    container = server(objects)
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    values = environment(container)
    assert len(values) == len(container["env"])
    assert values["NIM_SERVER_PORT"] == str(ports["http-openai"])
    assert values.get("NIM_HEALTH_PORT") == (str(ports["health"]) if "health" in ports else None)
    mounts = {each["mountPath"]: each["name"] for each in container["volumeMounts"]}
    assert mounts[values["NIM_CACHE_PATH"]] == "model-store"
    for name in ("DGEMMA_API_KEY_HASHES", "NIM_SSL_CERTS_PATH", "NIM_SSL_KEY_PATH"):
        if name in values:
            assert str(Path(values[name]).parent) in mounts


def test_every_mount_has_its_volume(objects: list[Object]) -> None:
    templates = {each["metadata"]["name"] for each in workload(objects)["spec"].get("volumeClaimTemplates", [])}
    for spec in pod_specs(objects):
        volumes = [each["name"] for each in spec.get("volumes", [])]
        assert len(set(volumes)) == len(volumes)
        for container in containers(spec):
            assert {each["name"] for each in container.get("volumeMounts", [])} <= {*volumes, *templates}


def test_triton_is_reached_only_where_a_value_says_so(rendered: dict[str, list[Object]]) -> None:
    for name, objects in rendered.items():
        exposed = {each["name"] for each in server(objects)["ports"]} & {"grpc", "triton-metrics"}
        assert bool(exposed) == (name == "engine-job")
        assert environment(server(objects)).get("DGEMMA_EXPOSE_TRITON") == ("1" if exposed else None)


def test_shared_memory_is_memory(objects: list[Object]) -> None:
    mounts = {each["mountPath"]: each["name"] for each in server(objects)["volumeMounts"]}
    (volume,) = [each for each in pod_spec(objects)["volumes"] if each["name"] == mounts["/dev/shm"]]
    assert volume["emptyDir"]["medium"] == "Memory"
    assert volume["emptyDir"]["sizeLimit"]


def test_a_pod_outlives_its_requests(objects: list[Object]) -> None:
    spec, container = pod_spec(objects), server(objects)
    sleep = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    assert spec["terminationGracePeriodSeconds"] >= sleep + int(environment(container)["DGEMMA_DRAIN_S"]) + 10


def test_pods_are_restricted_unless_told_otherwise(rendered: dict[str, list[Object]]) -> None:
    """The rules of the Pod Security Standard `restricted`, and a read-only root filesystem."""
    for name, objects in rendered.items():
        if name == "host-path":
            continue
        for spec in pod_specs(objects):
            assert spec["automountServiceAccountToken"] is (name == "secure" and "lifecycle" in spec["containers"][0])
            assert spec["enableServiceLinks"] is False
            assert spec["securityContext"]["runAsNonRoot"] is True
            assert spec["securityContext"]["runAsUser"] > 0
            assert spec["securityContext"]["seccompProfile"]["type"] in ("RuntimeDefault", "Localhost")
            for container in [each for each in containers(spec) if each["name"] != "wait-for-network"]:
                assert container["securityContext"]["readOnlyRootFilesystem"] is True
                assert container["securityContext"]["allowPrivilegeEscalation"] is False
                assert "ALL" in container["securityContext"]["capabilities"]["drop"]


def test_no_secret_is_rendered(objects: list[Object]) -> None:
    assert of_kind(objects, "Secret") == []
    for item in objects:
        for value in walk(item):
            if isinstance(value, dict) and {"name", "value"} <= value.keys():
                assert not any(word in value["name"] for word in ("API_KEY", "TOKEN")) or value["value"].startswith("/")
    assert not any(word in json.dumps(objects) for word in SECRETS)


def test_an_image_by_digest(rendered: dict[str, list[Object]]) -> None:
    images = {each["image"] for spec in pod_specs(rendered["secure"]) for each in containers(spec)}
    assert len(images) == 1
    assert "@sha256:" in images.pop()


def test_an_engine_is_built_with_the_servers_settings(rendered: dict[str, list[Object]]) -> None:
    (job,) = of_kind(rendered["engine-job"], "Job")
    (build,) = job["spec"]["template"]["spec"]["containers"]
    assert job["metadata"]["annotations"]["helm.sh/hook"] == "pre-install,pre-upgrade"
    (init,) = pod_spec(rendered["cpu"])["initContainers"]
    for container, objects in ((build, rendered["engine-job"]), (init, rendered["cpu"])):
        values = environment(container)
        assert values.pop("NIM_ENGINE_MODEL_DOWNLOAD_ONLY") == "1"
        assert values.items() <= environment(server(objects)).items()
        assert container["image"] == server(objects)["image"]
        assert {each["mountPath"] for each in container["volumeMounts"]} >= {
            values["NIM_CACHE_PATH"],
            "/tmp",
            "/dev/shm",
        }
    claims = [
        each["persistentVolumeClaim"]["claimName"]
        for each in walk(job)
        if isinstance(each, dict) and "persistentVolumeClaim" in each
    ]
    assert claims == ["engines"]


def test_the_autoscaler_points_at_the_workload_and_owns_the_replicas(rendered: dict[str, list[Object]]) -> None:
    scaled = {name for name, objects in rendered.items() if of_kind(objects, "HorizontalPodAutoscaler")}
    assert scaled == {"shared-claim", "engine-job", "nfs"}
    for name in scaled:
        (scaler,) = of_kind(rendered[name], "HorizontalPodAutoscaler")
        target, owner = scaler["spec"]["scaleTargetRef"], workload(rendered[name])
        assert (target["kind"], target["name"]) == (owner["kind"], owner["metadata"]["name"])
        assert "replicas" not in owner["spec"]


def test_the_queue_metric_is_one_that_is_published(rendered: dict[str, list[Object]]) -> None:
    page = (helm.ROOT / "docs/observability.md").read_text()
    (scaler,) = of_kind(rendered["engine-job"], "HorizontalPodAutoscaler")
    metric = scaler["spec"]["metrics"][0]["external"]["metric"]
    assert f"| `{metric['name']}` | gauge | requests | `state`: waiting" in page
    assert metric["selector"]["matchLabels"] == {"state": "waiting"}


@pytest.mark.parametrize("release", ["a", "r" * 53])
def test_names_stay_within_limits(release: str, tmp_path: Path) -> None:
    values = tmp_path / "values.yaml"
    values.write_text("{engineBuild: {enabled: true, kind: job}, persistence: {enabled: true, existingClaim: a}}")
    for item in read_objects(helm.render(values, release)):
        assert len(item["metadata"]["name"]) <= 63
        assert all(len(value) <= 63 for value in item["metadata"]["labels"].values())
