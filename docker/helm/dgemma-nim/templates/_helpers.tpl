{{/* Names, labels, and what several templates need to know of the values. */}}

{{- define "dgemma-nim.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{/* Short enough that what is appended to it stays within 63 characters. */}}
{{- define "dgemma-nim.fullname" -}}
{{- $name := include "dgemma-nim.name" . -}}
{{- if .Values.fullnameOverride -}}
{{- $name = .Values.fullnameOverride -}}
{{- else if contains $name .Release.Name -}}
{{- $name = .Release.Name -}}
{{- else -}}
{{- $name = printf "%s-%s" .Release.Name $name -}}
{{- end -}}
{{- $name | trunc 47 | trimSuffix "-" -}}
{{- end -}}

{{- define "dgemma-nim.serviceName" -}}
{{- default (include "dgemma-nim.fullname" .) .Values.service.name -}}
{{- end -}}

{{- define "dgemma-nim.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "dgemma-nim.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* Of one release; which of its pods serve, the component says. */}}
{{- define "dgemma-nim.releaseLabels" -}}
app.kubernetes.io/name: {{ include "dgemma-nim.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "dgemma-nim.selectorLabels" -}}
{{ include "dgemma-nim.releaseLabels" . }}
app.kubernetes.io/component: server
{{- end -}}

{{- define "dgemma-nim.commonLabels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{- define "dgemma-nim.labels" -}}
{{ include "dgemma-nim.commonLabels" . }}
{{ include "dgemma-nim.selectorLabels" . }}
{{- end -}}

{{- define "dgemma-nim.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{- printf "%s@%s" .repository .digest -}}
{{- else -}}
{{- printf "%s:%s" .repository (default $.Chart.AppVersion .tag) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Not empty where each pod of the StatefulSet has a claim of its own. */}}
{{- define "dgemma-nim.claimPerPod" -}}
{{- with .Values.persistence -}}
{{- if and .enabled $.Values.statefulSet.enabled (not .existingClaim) (ne .accessMode "ReadWriteMany") -}}yes{{- end -}}
{{- end -}}
{{- end -}}

{{/* Not empty where the chart makes one claim for all pods. */}}
{{- define "dgemma-nim.oneClaim" -}}
{{- if and .Values.persistence.enabled (not .Values.persistence.existingClaim) (not (include "dgemma-nim.claimPerPod" .)) -}}yes{{- end -}}
{{- end -}}

{{- define "dgemma-nim.claimSpec" -}}
{{- with .Values.persistence -}}
accessModes: [{{ .accessMode }}]
resources:
  requests:
    storage: {{ .size | quote }}
{{- if eq (default "" .storageClass) "-" }}
storageClassName: ""
{{- else if .storageClass }}
storageClassName: {{ .storageClass | quote }}
{{- end }}
{{- end -}}
{{- end -}}

{{/* Not empty where probes have a port of their own. */}}
{{- define "dgemma-nim.ownHealthPort" -}}
{{- if and .Values.healthPort (ne (int .Values.healthPort) (int .Values.model.openaiPort)) -}}yes{{- end -}}
{{- end -}}

{{- define "dgemma-nim.scheme" -}}
{{- ternary "HTTPS" "HTTP" (not (empty .Values.tls.existingSecret)) -}}
{{- end -}}

{{/* The ports of the container and of the service: name, port in the pod, port of the service. */}}
{{- define "dgemma-nim.ports" -}}
- {name: http-openai, container: {{ int .Values.model.openaiPort }}, service: {{ int .Values.service.openaiPort }}}
{{- if .Values.service.grpcPort }}
- {name: grpc, container: 8001, service: {{ int .Values.service.grpcPort }}}
{{- end }}
{{- if .Values.service.metricsPort }}
- {name: triton-metrics, container: 8002, service: {{ int .Values.service.metricsPort }}}
{{- end }}
{{- end -}}

{{- define "dgemma-nim.servicePorts" -}}
{{- range include "dgemma-nim.ports" . | fromYamlArray }}
- name: {{ .name }}
  port: {{ .service }}
  targetPort: {{ .name }}
  protocol: TCP
{{- end }}
{{- end -}}
