"""What the chart refuses, and in which words: each message names the value and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from dgemma_build.chart import helm, kinds

# Values as YAML, and what the message says.
UNKNOWN = {
    "modle: {name: x}": ("at ''", "'modle' not allowed"),
    "model: {nmae: x}": ("at '/model'", "'nmae'"),
    "image: {registry: x}": ("at '/image'", "'registry'"),
    "livenessProbe: {intervalSeconds: 3}": ("at '/livenessProbe'", "'intervalSeconds'"),
    "service: {grpc_port: 8001}": ("at '/service'", "'grpc_port'"),
    "persistence: {stsPersistentVolumeClaimRetentionPolicy: {deleted: Retain}}": ("'deleted'",),
    "metrics: {serviceMonitor: {labels: {}}}": ("at '/metrics/serviceMonitor'", "'labels'"),
    "env: [{name: A, valeu: b}]": ("at '/env/0'", "'valeu'"),
    "tolerations: [{operater: Exists}]": ("at '/tolerations/0'", "'operater'"),
    "podSecurityContext: {readOnlyRootFilesystem: true}": ("at '/podSecurityContext'", "'readOnlyRootFilesystem'"),
    "containerSecurityContext: {fsGroup: 1000}": ("at '/containerSecurityContext'", "'fsGroup'"),
    "resources: {limit: {cpu: 1}}": ("at '/resources'", "'limit'"),
    "ingress: {hosts: [{host: a, path: /}]}": ("at '/ingress/hosts/0'", "'path'"),
    "autoscaling: {queue: {averageValue: 3}}": ("at '/autoscaling/queue'", "'averageValue'"),
}
WRONG = {
    "replicaCount: two": ("at '/replicaCount'", "want integer"),
    "model: {jsonLogging: 'yes'}": ("at '/model/jsonLogging'", "want boolean"),
    "model: {openaiPort: 70000}": ("at '/model/openaiPort'", "got 70,000, want 65,535"),
    "model: {logLevel: VERBOSE}": ("at '/model/logLevel'", "'DEFAULT', 'TRACE', 'DEBUG'"),
    "model: {nimCache: cache}": ("at '/model/nimCache'", "pattern"),
    "image: {digest: sha256:12}": ("at '/image/digest'", "pattern"),
    "image: {repository: ''}": ("at '/image/repository'",),
    "persistence: {size: lots}": ("at '/persistence/size'", "pattern"),
    "persistence: {accessMode: ReadWriteSometimes}": ("at '/persistence/accessMode'",),
    "env: [{name: A, value: 1}]": ("at '/env/0/value'", "want string"),
    "extraVolumes: [{name: a}]": ("at '/extraVolumes'", "want object"),
    "engineBuild: {kind: cronJob}": ("at '/engineBuild/kind'", "'initContainer', 'job'"),
    "ingress: {hosts: [{host: a, paths: [{path: /, serviceType: nemo}]}]}": ("serviceType", "'openai'"),
    "metrics: {serviceMonitor: {interval: 15}}": ("at '/metrics/serviceMonitor/interval'", "want string"),
    "livenessProbe: {successThreshold: 2}": ("at '/livenessProbe/successThreshold'",),
    "enabled: false": ("at '/enabled'",),
}
TOGETHER = {
    "terminationGracePeriodSeconds: 30": (
        "terminationGracePeriodSeconds: 30 is too short for preStopSleepSeconds (5) and exitTimeoutSeconds (30)",
        "set it to 45 at least",
    ),
    "exitTimeoutSeconds: 600": ("terminationGracePeriodSeconds: 60 is too short", "set it to 615 at least"),
    "{persistence: {enabled: true}, hostPath: {enabled: true}}": (
        "persistence.enabled and hostPath.enabled: only one of them may be true; choose one kind of storage",
    ),
    "{persistence: {enabled: true}, nfs: {enabled: true}}": ("persistence.enabled and nfs.enabled: only one",),
    "persistence: {existingClaim: engines}": ('persistence.existingClaim: "engines" is not used', "set that to true"),
    "{statefulSet: {enabled: false}, replicaCount: 2, persistence: {enabled: true}}": (
        'persistence.accessMode: "ReadWriteOnce" lets only one node use the claim, and there may be 2 pods',
    ),
    "{statefulSet: {enabled: false}, persistence: {enabled: true}, autoscaling: {enabled: true}}": (
        "there may be 10 pods",
    ),
    "engineBuild: {enabled: true, kind: job}": ('engineBuild.kind: "job" runs before', "persistence.existingClaim"),
    "{engineBuild: {enabled: true}, nfs: {enabled: true, readOnly: true}}": (
        "engineBuild.enabled: nfs.readOnly is true",
    ),
    "extraVolumes: {dshm: {emptyDir: {}}}": ('extraVolumes: "dshm" is a volume of the chart; choose another name',),
    "extraVolumeMounts: {lost: {mountPath: /a}}": (
        'extraVolumeMounts: there is no volume "lost"; add it to extraVolumes',
    ),
    "model: {openaiPort: 8001}": ("model.openaiPort: 8001 is the port of Triton's gRPC in the pod; choose another",),
    "healthPort: 8002": ("healthPort: 8002 is the port of Triton's metrics in the pod; choose another",),
    "service: {grpcPort: 8000}": ("service.grpcPort: 8000 is service.openaiPort too; choose another",),
    "env: [{name: NIM_SERVER_PORT, value: '9'}]": ("env: NIM_SERVER_PORT is set by the value model.openaiPort",),
    "env: [{name: NIM_CACHE_PATH, value: /a}]": ("env: NIM_CACHE_PATH is set by the value model.nimCache",),
    "{tls: {existingSecret: a}, env: [{name: NIM_SSL_MODE, value: MTLS}]}": ("is set by the value tls.existingSecret",),
    "env: [{name: A, value: a}, {name: A, value: b}]": ("env: A is there twice; keep one",),
    "podDisruptionBudget: {minAvailable: 1}": ("podDisruptionBudget: give either minAvailable or maxUnavailable",),
    "podDisruptionBudget: {maxUnavailable: ''}": ("podDisruptionBudget: give either minAvailable or maxUnavailable",),
    "autoscaling: {enabled: true, minReplicas: 11}": (
        "autoscaling.minReplicas: 11 is more than autoscaling.maxReplicas (10)",
    ),
    "autoscaling: {enabled: true, queue: {enabled: false}}": ("autoscaling.enabled: there is nothing to scale on",),
    "autoscaling: {enabled: true, targetCPUUtilizationPercentage: 80}": ("a share of resources.requests.cpu",),
    "livenessProbe: {method: script}": ("livenessProbe.command: empty",),
    "apiKeys: {existingSecret: keys}": ("tests.apiKeySecret: empty", "or set tests.enabled to false"),
    "model: {ngcAPIKey: nvapi-secret}": ("model.ngcAPIKey: a key would stand readable in the release",),
    "model: {legacyCompat: true}": ("model.legacyCompat: containers older than NIM 1.0 are not supported",),
    "initContainers: {ngcInit: {imageName: a}}": ("initContainers.ngcInit: downloads for containers older",),
    "multiNode: {enabled: true, workers: 2}": (
        "multiNode.enabled: an engine runs on one GPU; scale out with replicaCount",
    ),
}


@pytest.mark.parametrize(("values", "words"), {**UNKNOWN, **WRONG, **TOGETHER}.items())
def test_is_refused_by_name(values: str, words: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(helm.HelmError) as refused:
        helm.render(_file(tmp_path, values))
    for word in words:
        assert word in str(refused.value)


def test_a_refused_key_is_not_repeated(tmp_path: Path) -> None:
    with pytest.raises(helm.HelmError) as refused:
        helm.render(_file(tmp_path, "model: {ngcAPIKey: nvapi-secret}"))
    assert "nvapi-secret" not in str(refused.value)


@pytest.mark.parametrize(
    "values",
    [
        "terminationGracePeriodSeconds: 45",
        "{persistence: {enabled: true}, hostPath: {enabled: false, path: /other}}",
        "{statefulSet: {enabled: false}, persistence: {enabled: true}}",
        "{statefulSet: {enabled: false}, replicaCount: 2, persistence: {enabled: true, existingClaim: engines}}",
        "persistence: {enabled: true, storageClass: null}",
        "{healthPort: 8000, model: {openaiPort: 8000}}",
        "{enabled: true, global: {imageRegistry: x}}",  # as a dependency of another chart
        "{apiKeys: {existingSecret: keys}, tests: {enabled: false}}",
        "env: [{name: NIM_SERVED_MODEL_NAME, value: a}]",
    ],
)
def test_is_taken(values: str, tmp_path: Path) -> None:
    objects = kinds.read_objects(helm.render(_file(tmp_path, values)))
    assert [error for item in objects for error in kinds.errors_of(item, kinds.VERSIONS[-1])] == []


def _file(folder: Path, values: str) -> Path:
    path = folder / "values.yaml"
    path.write_text(values)
    return path
