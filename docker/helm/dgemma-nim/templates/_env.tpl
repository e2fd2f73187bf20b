{{/* The environment of the image, which is that of NVIDIA's NIMs and a few variables more. */}}

{{/* A list of variable and the value that sets it; what env may set instead of the chart has no value here. */}}
{{- define "dgemma-nim.ownEnv" -}}
- {name: HOME, value: /tmp}
- {name: HF_HOME, value: {{ printf "%s/huggingface" .Values.model.nimCache | quote }}}
- {name: NIM_CACHE_PATH, of: model.nimCache, value: {{ .Values.model.nimCache | quote }}}
- {name: NIM_SERVER_PORT, of: model.openaiPort, value: {{ int .Values.model.openaiPort | quote }}}
- {name: NIM_JSONL_LOGGING, of: model.jsonLogging, value: {{ ternary "1" "0" .Values.model.jsonLogging | quote }}}
- {name: NIM_LOG_LEVEL, of: model.logLevel, value: {{ .Values.model.logLevel | quote }}}
- {name: DGEMMA_DRAIN_S, of: exitTimeoutSeconds, value: {{ int .Values.exitTimeoutSeconds | quote }}}
{{- if include "dgemma-nim.ownHealthPort" . }}
- {name: NIM_HEALTH_PORT, of: healthPort, value: {{ int .Values.healthPort | quote }}}
{{- end }}
{{- with .Values.model.name }}
- {name: NIM_SERVED_MODEL_NAME, value: {{ . | quote }}}
{{- end }}
{{- with .Values.model.path }}
- {name: NIM_MODEL_PATH, of: model.path, value: {{ . | quote }}}
{{- end }}
{{- with .Values.model.profile }}
- {name: NIM_MODEL_PROFILE, of: model.profile, value: {{ . | quote }}}
{{- end }}
{{- with .Values.model.maxModelLen }}
- {name: NIM_MAX_MODEL_LEN, of: model.maxModelLen, value: {{ int . | quote }}}
{{- end }}
{{- with .Values.model.ngcAPISecret }}
- {name: NGC_API_KEY, of: model.ngcAPISecret, valueFrom: {secretKeyRef: {name: {{ . | quote }}, key: NGC_API_KEY}}}
{{- end }}
{{- with .Values.model.hfTokenSecret }}
- {name: HF_TOKEN, of: model.hfTokenSecret, valueFrom: {secretKeyRef: {name: {{ . | quote }}, key: HF_TOKEN}}}
{{- end }}
{{- if .Values.apiKeys.existingSecret }}
- {name: DGEMMA_API_KEY_HASHES, of: apiKeys.existingSecret, value: {{ printf "/etc/dgemma/api-keys/%s" .Values.apiKeys.key | quote }}}
{{- end }}
{{- if .Values.tls.existingSecret }}
- {name: NIM_SSL_MODE, of: tls.existingSecret, value: TLS}
- {name: NIM_SSL_CERTS_PATH, of: tls.existingSecret, value: /etc/dgemma/tls/tls.crt}
- {name: NIM_SSL_KEY_PATH, of: tls.existingSecret, value: /etc/dgemma/tls/tls.key}
{{- end }}
{{- if or .Values.service.grpcPort .Values.service.metricsPort }}
- {name: DGEMMA_EXPOSE_TRITON, of: service.grpcPort, value: "1"}
{{- end }}
{{- end -}}

{{/* Each name once: Kubernetes takes no list with a name twice. */}}
{{- define "dgemma-nim.env" -}}
{{- $given := list -}}
{{- range .Values.env }}{{ $given = append $given .name }}{{ end -}}
{{- $env := list -}}
{{- range include "dgemma-nim.ownEnv" . | fromYamlArray -}}
{{- if not (has .name $given) }}{{ $env = append $env (omit . "of") }}{{ end -}}
{{- end -}}
{{- toYaml (concat $env .Values.env) -}}
{{- end -}}

{{/* A build meets no client: neither keys nor certificates are mounted for it. */}}
{{- define "dgemma-nim.buildEnv" -}}
{{- $env := list -}}
{{- range include "dgemma-nim.env" . | fromYamlArray -}}
{{- if not (or (hasPrefix "NIM_SSL_" .name) (eq .name "DGEMMA_API_KEY_HASHES")) }}{{ $env = append $env . }}{{ end -}}
{{- end -}}
{{- toYaml $env -}}
{{- end -}}
