{{/* Where the chart puts files: nothing else is there. */}}
{{- define "lora-sidecar.etc" -}}/etc/lora-sidecar{{- end }}

{{/* The configuration file: what the chart knows, and `config`, `backends`, `store` and `queue` as they are given. */}}
{{- define "lora-sidecar.config" -}}
{{- include "lora-sidecar.check" . -}}
{{- $known := include "lora-sidecar.ownConfig" . | fromYaml -}}
{{- $given := deepCopy .Values.config -}}
{{- $all := mergeOverwrite $known $given (dict "backends" (include "lora-sidecar.backends" . | fromYamlArray) "store" (deepCopy .Values.store)) -}}
{{- if .Values.queue -}}
{{- $_ := set $all "queue" .Values.queue -}}
{{- end -}}
{{- toYaml $all -}}
{{- end }}

{{/* The part of the configuration of which a change restarts the pods. The rest a running process takes by itself, when
the file in its volume changes; `sidecar/config/reloading.py` has the same keys. Of backends, only pools are here. */}}
{{- define "lora-sidecar.fixedConfig" -}}
{{- $all := include "lora-sidecar.config" . | fromYaml -}}
{{- range include "lora-sidecar.reloadable" . | fromYamlArray -}}
{{- $path := splitList "." . -}}
{{- if eq (len $path) 1 -}}
{{- $_ := unset $all . -}}
{{- else if hasKey $all (first $path) -}}
{{- $section := get $all (first $path) -}}
{{- $_ := unset $section (last $path) -}}
{{- if not $section -}}
{{- $_ := unset $all (first $path) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $pools := list -}}
{{- range include "lora-sidecar.backends" . | fromYamlArray -}}
{{- if .discover -}}
{{- $pools = append $pools . -}}
{{- end -}}
{{- end -}}
{{- toYaml (set $all "pools" $pools) -}}
{{- end }}

{{- define "lora-sidecar.reloadable" -}}
- access.limits
- adapters
- backends
- base_requests
- origins.allow
- queue.answer_bytes_max
- queue.answers_bytes_max
- queue.classes
- queue.inbox_max
- queue.joining_s_max
- queue.output_tokens_assumed
- queue.queued_bytes_max
- queue.queued_max
- queue.queued_tokens_max
- queue.sequence_tokens_assumed
- queue.tenant_max_tokens
- queue.tenant_queued_bytes_max
- queue.tenant_queued_max
- queue.tenant_queued_tokens_max
- queue.tenant_weights
- store.prefetch_bytes_per_s
{{- end }}

{{- define "lora-sidecar.ownConfig" -}}
{{- $any := include "lora-sidecar.anyAddress" . -}}
log_format: json
watch_config: true
listeners:
  data:
    address: {{ printf "%s:9000" $any | quote }}
    {{- if include "lora-sidecar.clustered" . }}
    max_connection_age_s: 300
    {{- end }}
    {{- include "lora-sidecar.tls" (list "data" .Values.tls.data.secretName .Values.tls.data.clientCa) | nindent 4 }}
  http:
    address: {{ printf "%s:9002" $any | quote }}
    {{- include "lora-sidecar.tls" (list "http" .Values.tls.http.secretName false) | nindent 4 }}
  probes:
    address: {{ printf "%s:9005" $any | quote }}
    {{- include "lora-sidecar.tls" (list "http" .Values.tls.http.secretName false) | nindent 4 }}
  admin:
    address: {{ ternary (printf "%s:9001" $any) "127.0.0.1:9001" (eq (include "lora-sidecar.adminIsOpen" .) "true") | quote }}
    {{- if .Values.admin.tokenSecret.name }}
    token_file: {{ include "lora-sidecar.etc" . }}/admin-token/{{ .Values.admin.tokenSecret.key }}
    {{- end }}
    {{- if .Values.admin.allowCleartext }}
    allow_cleartext: true
    {{- end }}
    {{- include "lora-sidecar.tls" (list "admin" .Values.tls.admin.secretName .Values.tls.admin.clientCa) | nindent 4 }}
  {{- with include "lora-sidecar.pickerAddress" . }}
  endpoint_picker:
    address: {{ . | quote }}
    {{- /* What it names, gateways would ask, and reach nothing or another. */}}
    {{- if and $.Values.envoy.enabled (not $.Values.inferencePool.create) (not $.Values.tls.http.secretName) }}
    in_path: {{ ternary "[::1]:9002" "127.0.0.1:9002" $.Values.ipv6 | quote }}
    {{- end }}
    {{- include "lora-sidecar.tls" (list "picker" $.Values.tls.picker.secretName false) | nindent 4 }}
  {{- end }}
  {{- if eq .Values.mode "sidecar" }}
  drain:
    address: 127.0.0.1:9004
  {{- end }}
identity:
  mode: {{ include "lora-sidecar.identityMode" . | quote }}
  {{- if include "lora-sidecar.keysSecret" . }}
  keys_file: {{ include "lora-sidecar.etc" . }}/identity-keys/keys.yaml
  {{- end }}
{{- if .Values.persistence.enabled }}
data_directory: /var/lib/lora-sidecar
{{- end }}
{{- with include "lora-sidecar.redisUrl" . }}
state:
  url: {{ . | quote }}
  {{- if include "lora-sidecar.redisSecret" $ }}
  password_file: {{ include "lora-sidecar.etc" $ }}/redis-password/{{ $.Values.redis.passwordSecret.key }}
  {{- end }}
  {{- with $.Values.redis.tlsSecret }}
  tls:
    ca: {{ include "lora-sidecar.etc" $ }}/tls-redis/ca.crt
  {{- end }}
{{- end }}
{{- if include "lora-sidecar.clustered" . }}
replicas:
  address: {{ printf "%s:9003" $any | quote }}
  {{- include "lora-sidecar.tls" (list "replicas" .Values.tls.replicas.secretName true) | nindent 2 }}
{{- end }}
{{- if include "lora-sidecar.reconciles" . }}
kubernetes:
  adapters:
    config_maps: {{ eq (include "lora-sidecar.readsConfigMaps" .) "true" }}
    custom_resources: {{ .Values.declared.customResources }}
    label: {{ .Values.declared.label | quote }}
{{- end }}
{{- end }}

{{/* `tls` of a listener, from its name, Secret and whether it asks its clients for certificates. */}}
{{- define "lora-sidecar.tls" -}}
{{- $folder := printf "/etc/lora-sidecar/tls-%s" (index . 0) -}}
{{- if index . 1 -}}
tls:
  certificate: {{ $folder }}/tls.crt
  key: {{ $folder }}/tls.key
  {{- if index . 2 }}
  ca: {{ $folder }}/ca.crt
  {{- end }}
{{- end -}}
{{- end }}

{{/* In sidecar mode the engine is in the same pod, and is named here unless the values do. */}}
{{- define "lora-sidecar.backends" -}}
{{- if and (eq .Values.mode "sidecar") (not .Values.backends) -}}
{{- if eq .Values.sidecar.kind "vllm" -}}
- url: vllm://127.0.0.1:8000
  id: engine
  adapters_dir: /adapters
{{- else if eq .Values.sidecar.kind "sglang" -}}
{{- fail "sidecar.kind sglang needs backends: one entry with url sglang://127.0.0.1:30000 and base_model.config, the folder of the model's config.json; without it no adapter can be checked, and none is served" }}
{{- else -}}
- url: triton://127.0.0.1:8001
  id: engine
  metrics: http://127.0.0.1:8002/metrics
  weights_transport: shared_memory
{{- end -}}
{{- else -}}
{{- toYaml .Values.backends -}}
{{- end -}}
{{- end }}
