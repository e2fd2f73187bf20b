{{/* Parts of pods: what the server, the build of the engine and the test pods share. */}}

{{- define "dgemma-nim.podSecurity" -}}
serviceAccountName: {{ include "dgemma-nim.serviceAccountName" . }}
automountServiceAccountToken: {{ .Values.serviceAccount.automount }}
{{ include "dgemma-nim.podBase" . }}
{{- end -}}

{{/* No links: a service called "nim-server" would set NIM_SERVER_PORT in every pod of the namespace. */}}
{{- define "dgemma-nim.podBase" -}}
enableServiceLinks: false
securityContext:
  {{- toYaml .Values.podSecurityContext | nindent 2 }}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "dgemma-nim.placement" -}}
{{- range $field, $value := pick .Values "nodeSelector" "affinity" "tolerations" "priorityClassName" "runtimeClassName" }}
{{- if $value }}
{{ toYaml (dict $field $value) }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "dgemma-nim.containerBase" -}}
image: {{ include "dgemma-nim.image" . | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  {{- toYaml .Values.containerSecurityContext | nindent 2 }}
{{- end -}}

{{/* Without API keys and certificates: a build needs none. */}}
{{- define "dgemma-nim.storageMounts" -}}
- name: model-store
  mountPath: {{ .Values.model.nimCache | quote }}
- name: dshm
  mountPath: /dev/shm
- name: scratch
  mountPath: /tmp
{{- end -}}

{{- define "dgemma-nim.mounts" -}}
{{ include "dgemma-nim.storageMounts" . }}
{{- if .Values.apiKeys.existingSecret }}
- name: api-keys
  mountPath: /etc/dgemma/api-keys
  readOnly: true
{{- end }}
{{- if .Values.tls.existingSecret }}
- name: tls
  mountPath: /etc/dgemma/tls
  readOnly: true
{{- end }}
{{- range $name, $mount := .Values.extraVolumeMounts }}
- {{ merge (dict "name" $name) $mount | toYaml | nindent 2 | trim }}
{{- end }}
{{- end -}}

{{- define "dgemma-nim.storageVolumes" -}}
- name: dshm
  emptyDir:
    medium: Memory
    sizeLimit: {{ .Values.sharedMemory.sizeLimit | quote }}
- name: scratch
  emptyDir:
    sizeLimit: {{ .Values.scratch.sizeLimit | quote }}
{{- if not (include "dgemma-nim.claimPerPod" .) }}
- name: model-store
  {{- if .Values.persistence.enabled }}
  persistentVolumeClaim:
    claimName: {{ default (include "dgemma-nim.fullname" .) .Values.persistence.existingClaim }}
  {{- else if .Values.hostPath.enabled }}
  hostPath:
    path: {{ .Values.hostPath.path | quote }}
    type: DirectoryOrCreate
  {{- else if .Values.nfs.enabled }}
  nfs:
    {{- toYaml (omit .Values.nfs "enabled") | nindent 4 }}
  {{- else }}
  emptyDir: {}
  {{- end }}
{{- end }}
{{- end -}}

{{- define "dgemma-nim.volumes" -}}
{{ include "dgemma-nim.storageVolumes" . }}
{{- with .Values.apiKeys.existingSecret }}
- name: api-keys
  secret:
    secretName: {{ . }}
    defaultMode: 0440
{{- end }}
{{- with .Values.tls.existingSecret }}
- name: tls
  secret:
    secretName: {{ . }}
    defaultMode: 0440
{{- end }}
{{- range $name, $volume := .Values.extraVolumes }}
- {{ merge (dict "name" $name) $volume | toYaml | nindent 2 | trim }}
{{- end }}
{{- end -}}

{{- define "dgemma-nim.engineBuildContainer" -}}
name: engine-build
{{ include "dgemma-nim.containerBase" . }}
{{- with .Values.customCommand }}
command:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.customArgs }}
args:
  {{- toYaml . | nindent 2 }}
{{- end }}
env:
  - name: NIM_ENGINE_MODEL_DOWNLOAD_ONLY
    value: "1"
  {{- include "dgemma-nim.buildEnv" . | nindent 2 }}
resources:
  {{- toYaml (default .Values.resources .Values.engineBuild.resources) | nindent 2 }}
volumeMounts:
  {{- include "dgemma-nim.storageMounts" . | nindent 2 }}
{{- end -}}

{{- define "dgemma-nim.probe" -}}
{{- $probe := .probe -}}
{{- if eq (default "http" $probe.method) "script" }}
exec:
  command:
    {{- toYaml $probe.command | nindent 4 }}
{{- else }}
httpGet:
  path: {{ $probe.path | quote }}
  {{- if include "dgemma-nim.ownHealthPort" .root }}
  port: health
  scheme: HTTP
  {{- else }}
  port: http-openai
  scheme: {{ include "dgemma-nim.scheme" .root }}
  {{- end }}
{{- end }}
{{ omit $probe "enabled" "method" "command" "path" | toYaml }}
{{- end -}}
