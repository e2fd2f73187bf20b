{{/* What the schema cannot say: values that do not go together, and those of nim-llm that mean nothing here. */}}

{{- define "dgemma-nim.validate" -}}
{{- include "dgemma-nim.validateLife" . -}}
{{- include "dgemma-nim.validateStorage" . -}}
{{- include "dgemma-nim.validatePorts" . -}}
{{- include "dgemma-nim.validateEnv" . -}}
{{- include "dgemma-nim.validateScaling" . -}}
{{- include "dgemma-nim.validateNimLlm" . -}}
{{- end -}}

{{- define "dgemma-nim.validateLife" -}}
{{- with .Values -}}
{{- $least := add .preStopSleepSeconds .exitTimeoutSeconds 10 | int -}}
{{- if lt (int .terminationGracePeriodSeconds) $least -}}
{{- fail (printf "terminationGracePeriodSeconds: %d is too short for preStopSleepSeconds (%d) and exitTimeoutSeconds (%d): requests would be cut off; set it to %d at least" (int .terminationGracePeriodSeconds) (int .preStopSleepSeconds) (int .exitTimeoutSeconds) $least) -}}
{{- end -}}
{{- if and .livenessProbe.enabled (eq .livenessProbe.method "script") (not .livenessProbe.command) -}}
{{- fail "livenessProbe.command: empty, and livenessProbe.method is \"script\"; give the command or use the method \"http\"" -}}
{{- end -}}
{{- if and .tests.enabled .apiKeys.existingSecret (not .tests.apiKeySecret) -}}
{{- fail "tests.apiKeySecret: empty, and apiKeys.existingSecret is set: the completion of `helm test` needs a key; name a Secret that has one, or set tests.enabled to false" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "dgemma-nim.validateStorage" -}}
{{- $enabled := list -}}
{{- range tuple "persistence" "hostPath" "nfs" -}}
{{- if (index $.Values .).enabled }}{{ $enabled = append $enabled (printf "%s.enabled" .) }}{{ end -}}
{{- end -}}
{{- if gt (len $enabled) 1 -}}
{{- fail (printf "%s: only one of them may be true; choose one kind of storage" (join " and " $enabled)) -}}
{{- end -}}
{{- with .Values -}}
{{- if and .persistence.existingClaim (not .persistence.enabled) -}}
{{- fail (printf "persistence.existingClaim: %q is not used, for persistence.enabled is false; set that to true" .persistence.existingClaim) -}}
{{- end -}}
{{- $pods := ternary .autoscaling.maxReplicas .replicaCount .autoscaling.enabled | int -}}
{{- if and (include "dgemma-nim.oneClaim" $) (ne .persistence.accessMode "ReadWriteMany") (gt $pods 1) -}}
{{- fail (printf "persistence.accessMode: %q lets only one node use the claim, and there may be %d pods; use ReadWriteMany, or statefulSet.enabled: true for a claim per pod" .persistence.accessMode $pods) -}}
{{- end -}}
{{- if and .engineBuild.enabled (eq .engineBuild.kind "job") (not .persistence.existingClaim) -}}
{{- fail "engineBuild.kind: \"job\" runs before the chart's own claims exist; name a claim in persistence.existingClaim, or use \"initContainer\"" -}}
{{- end -}}
{{- if and .engineBuild.enabled .nfs.enabled .nfs.readOnly -}}
{{- fail "engineBuild.enabled: nfs.readOnly is true, so nothing can be built there; set one of them to false" -}}
{{- end -}}
{{- $names := list "model-store" "dshm" "scratch" "api-keys" "tls" -}}
{{- range $name, $_ := .extraVolumes -}}
{{- if has $name $names }}{{ fail (printf "extraVolumes: %q is a volume of the chart; choose another name" $name) }}{{ end -}}
{{- end -}}
{{- range $name, $_ := .extraVolumeMounts -}}
{{- if not (or (hasKey $.Values.extraVolumes $name) (has $name $names)) }}{{ fail (printf "extraVolumeMounts: there is no volume %q; add it to extraVolumes" $name) }}{{ end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "dgemma-nim.validatePorts" -}}
{{- $owners := dict "8001" "Triton's gRPC" "8002" "Triton's metrics" "8003" "Triton's HTTP" -}}
{{- $api := int .Values.model.openaiPort | toString -}}
{{- if hasKey $owners $api }}{{ fail (printf "model.openaiPort: %s is the port of %s in the pod; choose another" $api (get $owners $api)) }}{{ end -}}
{{- $health := int .Values.healthPort | toString -}}
{{- if hasKey $owners $health }}{{ fail (printf "healthPort: %s is the port of %s in the pod; choose another" $health (get $owners $health)) }}{{ end -}}
{{- $taken := dict -}}
{{- range tuple "openaiPort" "grpcPort" "metricsPort" -}}
{{- $port := int (index $.Values.service .) -}}
{{- if $port -}}
{{- if hasKey $taken ($port | toString) }}{{ fail (printf "service.%s: %d is service.%s too; choose another" . $port (get $taken ($port | toString))) }}{{ end -}}
{{- $_ := set $taken ($port | toString) . -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "dgemma-nim.validateEnv" -}}
{{- $owners := dict -}}
{{- range include "dgemma-nim.ownEnv" . | fromYamlArray }}{{ $_ := set $owners .name (default "" .of) }}{{ end -}}
{{- $given := list -}}
{{- range .Values.env -}}
{{- if has .name $given }}{{ fail (printf "env: %s is there twice; keep one" .name) }}{{ end -}}
{{- $given = append $given .name -}}
{{- with get $owners .name }}{{ fail (printf "env: %s is set by the value %s; use that and leave the variable out" (last $given) .) }}{{ end -}}
{{- end -}}
{{- end -}}

{{- define "dgemma-nim.validateScaling" -}}
{{- with .Values.podDisruptionBudget -}}
{{- if and .enabled (eq (toString .minAvailable | empty) (toString .maxUnavailable | empty)) -}}
{{- fail "podDisruptionBudget: give either minAvailable or maxUnavailable, and set the other one to \"\"" -}}
{{- end -}}
{{- end -}}
{{- with .Values.autoscaling -}}
{{- if .enabled -}}
{{- if gt (int .minReplicas) (int .maxReplicas) -}}
{{- fail (printf "autoscaling.minReplicas: %d is more than autoscaling.maxReplicas (%d)" (int .minReplicas) (int .maxReplicas)) -}}
{{- end -}}
{{- if not (or .metrics .queue.enabled .targetCPUUtilizationPercentage) -}}
{{- fail "autoscaling.enabled: there is nothing to scale on; enable autoscaling.queue, or set autoscaling.targetCPUUtilizationPercentage or autoscaling.metrics" -}}
{{- end -}}
{{- if and .targetCPUUtilizationPercentage (not .metrics) (not (dig "requests" "cpu" "" $.Values.resources)) -}}
{{- fail "autoscaling.targetCPUUtilizationPercentage: a share of resources.requests.cpu, which is not set; set it" -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "dgemma-nim.validateNimLlm" -}}
{{- with .Values.model -}}
{{- if .ngcAPIKey -}}
{{- fail "model.ngcAPIKey: a key would stand readable in the release; put it into a Secret as NGC_API_KEY and name that in model.ngcAPISecret" -}}
{{- end -}}
{{- if .legacyCompat -}}
{{- fail "model.legacyCompat: containers older than NIM 1.0 are not supported; set it to false" -}}
{{- end -}}
{{- end -}}
{{- if .Values.initContainers.ngcInit -}}
{{- fail "initContainers.ngcInit: downloads for containers older than NIM 1.0 are not supported; use initContainers.extraInit or engineBuild" -}}
{{- end -}}
{{- if dig "enabled" false (default dict .Values.multiNode) -}}
{{- fail "multiNode.enabled: an engine runs on one GPU; scale out with replicaCount or autoscaling (docker/kubernetes/README.md)" -}}
{{- end -}}
{{- end -}}
