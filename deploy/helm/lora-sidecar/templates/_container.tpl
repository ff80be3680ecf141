{{/* The container of the process, the same in both modes but for what the modes add. */}}
{{- define "lora-sidecar.container" -}}
name: lora-sidecar
image: {{ include "lora-sidecar.image" . }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
args: [serve, --config, {{ include "lora-sidecar.etc" . }}/config/config.yaml]
env:
  {{- include "lora-sidecar.env" . | nindent 2 }}
{{- with .Values.envFrom }}
envFrom:
  {{- toYaml . | nindent 2 }}
{{- end }}
ports:
  - {name: grpc-data, containerPort: 9000}
  - {name: http, containerPort: 9002}
  - {name: probes, containerPort: 9005}
  {{- if include "lora-sidecar.adminIsOpen" . }}
  - {name: grpc-admin, containerPort: 9001}
  {{- end }}
  {{- if include "lora-sidecar.clustered" . }}
  - {name: grpc-replicas, containerPort: 9003}
  {{- end }}
  {{- if .Values.inferencePool.create }}
  - {name: grpc-picker, containerPort: {{ include "lora-sidecar.pickerPort" . }}}
  {{- end }}
startupProbe:
  {{- include "lora-sidecar.probe" (list . "/livez") | nindent 2 }}
  periodSeconds: 2
  failureThreshold: {{ max 1 (div (int .Values.probes.startupSeconds) 2) }}
livenessProbe:
  {{- include "lora-sidecar.probe" (list . "/livez") | nindent 2 }}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: {{ max 1 (div (int .Values.probes.livenessSeconds) 10) }}
readinessProbe:
  {{- include "lora-sidecar.probe" (list . "/readyz") | nindent 2 }}
  periodSeconds: {{ .Values.probes.readinessSeconds }}
  timeoutSeconds: 3
  failureThreshold: 2
resources:
  {{- include "lora-sidecar.resources" . | nindent 2 }}
securityContext:
  {{- include "lora-sidecar.ownSecurity" . | nindent 2 }}
volumeMounts:
  {{- include "lora-sidecar.volumeMounts" . | nindent 2 }}
{{- end }}

{{/* In an engine's pod, whose own context is the engine's, all of it is said. */}}
{{- define "lora-sidecar.ownSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- if eq .Values.mode "sidecar" }}
runAsNonRoot: true
runAsUser: {{ .Values.podSecurity.user }}
seccompProfile:
  type: RuntimeDefault
{{- end }}
{{- end }}

{{- define "lora-sidecar.probe" -}}
{{- $context := index . 0 -}}
httpGet:
  path: {{ index . 1 }}
  port: probes
  {{- if $context.Values.tls.http.secretName }}
  scheme: HTTPS
  {{- end }}
{{- end }}

{{- define "lora-sidecar.env" -}}
- {name: HOME, value: /tmp}
- name: POD_IP
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
- name: POD_NAME
  valueFrom: {fieldRef: {fieldPath: metadata.name}}
{{- if include "lora-sidecar.clustered" . }}
- name: LORA_SIDECAR_REPLICAS__ADVERTISE
  {{- /* Quoted within: the text is read as YAML, where a bare [::1]:9003 is a list. */}}
  {{- if include "lora-sidecar.stateful" . }}
  value: {{ printf "\"$(POD_NAME).%s-replicas.%s.svc:9003\"" (include "lora-sidecar.fullname" .) .Release.Namespace | quote }}
  {{- else if .Values.ipv6 }}
  value: "\"[$(POD_IP)]:9003\""
  {{- else }}
  value: "\"$(POD_IP):9003\""
  {{- end }}
{{- end }}
{{- with .Values.admin.tokenSecret }}
{{- if .name }}
- {name: LORA_SIDECAR_TOKEN_FILE, value: {{ include "lora-sidecar.etc" $ }}/admin-token/{{ .key }}}
{{- end }}
{{- end }}
{{- with .Values.env }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* The Secrets that are mounted, as a list of folder and Secret under one key. */}}
{{- define "lora-sidecar.secrets" -}}
secrets:
{{- range $listener := list "data" "http" "admin" "replicas" "picker" }}
{{- with (index $.Values.tls $listener).secretName }}
  - {name: tls-{{ $listener }}, secret: {{ . }}}
{{- end }}
{{- end }}
{{- with .Values.redis.tlsSecret }}
  - {name: tls-redis, secret: {{ . }}}
{{- end }}
{{- with include "lora-sidecar.redisSecret" . }}
  - {name: redis-password, secret: {{ . }}}
{{- end }}
{{- with .Values.admin.tokenSecret.name }}
  - {name: admin-token, secret: {{ . }}}
{{- end }}
{{- /* Not the Secret's other keys: a Job puts the API keys themselves beside the file of their hashes. */}}
{{- with include "lora-sidecar.keysSecret" . }}
  - {name: identity-keys, secret: {{ . }}, key: keys.yaml}
{{- end }}
{{- range .Values.secretMounts }}
  - {name: {{ .name }}, secret: {{ .secretName }}}
{{- end }}
{{- end }}

{{- define "lora-sidecar.volumeMounts" -}}
- {name: {{ include "lora-sidecar.volumePrefix" . }}config, mountPath: {{ include "lora-sidecar.etc" . }}/config, readOnly: true}
- {name: {{ include "lora-sidecar.volumePrefix" . }}tmp, mountPath: /tmp}
{{- if .Values.persistence.enabled }}
- {name: data, mountPath: /var/lib/lora-sidecar}
{{- end }}
{{- range (include "lora-sidecar.secrets" . | fromYaml).secrets }}
- {name: {{ include "lora-sidecar.volumePrefix" $ }}{{ .name }}, mountPath: {{ include "lora-sidecar.etc" $ }}/{{ .name }}, readOnly: true}
{{- end }}
{{- if eq .Values.mode "sidecar" }}
{{ include "lora-sidecar.sidecar.sharedMounts" . }}
{{- end }}
{{- with .Values.volumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "lora-sidecar.volumes" -}}
- name: {{ include "lora-sidecar.volumePrefix" . }}config
  configMap: {name: {{ include "lora-sidecar.fullname" . }}}
- name: {{ include "lora-sidecar.volumePrefix" . }}tmp
  emptyDir: {sizeLimit: {{ .Values.temporary.sizeLimit }}}
{{- range (include "lora-sidecar.secrets" . | fromYaml).secrets }}
- name: {{ include "lora-sidecar.volumePrefix" $ }}{{ .name }}
  secret: {secretName: {{ .secret }}, defaultMode: 0440{{ with .key }}, items: [{key: {{ . }}, path: {{ . }}}]{{ end }}}
{{- end }}
{{- if .Values.envoy.enabled }}
{{ include "lora-sidecar.envoyVolumes" . }}
{{- end }}
{{- if eq .Values.mode "sidecar" }}
{{ include "lora-sidecar.sidecar.sharedVolumes" . }}
{{- end }}
{{- with .Values.volumes }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* In another chart's pod our volumes must not have names that are taken. */}}
{{- define "lora-sidecar.volumePrefix" -}}
{{- if eq .Values.mode "sidecar" -}}lora-sidecar-{{- end -}}
{{- end }}
