{{/* The name that everything of a release begins with: short enough for a suffix. */}}
{{- define "lora-sidecar.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 45 | trimSuffix "-" -}}
{{- else if contains "lora-sidecar" .Release.Name -}}
{{- .Release.Name | trunc 45 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-lora-sidecar" .Release.Name | trunc 45 | trimSuffix "-" -}}
{{- end -}}
{{- end }}

{{- define "lora-sidecar.labels" -}}
{{ include "lora-sidecar.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* No value changes these for as long as the names stay: selectors cannot be changed by an upgrade. */}}
{{- define "lora-sidecar.selectorLabels" -}}
app.kubernetes.io/name: lora-sidecar
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{/* Which pods the Services and policies of a release mean: the gateways, or the engines with a sidecar beside them. */}}
{{- define "lora-sidecar.podSelector" -}}
{{ include "lora-sidecar.selectorLabels" . }}
app.kubernetes.io/component: {{ .Values.mode }}
{{- end }}

{{- define "lora-sidecar.metadata" -}}
name: {{ include "lora-sidecar.fullname" . }}
namespace: {{ .Release.Namespace }}
labels:
  {{- include "lora-sidecar.labels" . | nindent 2 }}
{{- end }}

{{- define "lora-sidecar.image" -}}
{{- $image := .Values.image -}}
{{- $image.repository }}:{{ $image.tag | default .Chart.AppVersion }}{{ with $image.digest }}@{{ . }}{{ end }}
{{- end }}

{{- define "lora-sidecar.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- .Values.serviceAccount.name | default (include "lora-sidecar.fullname" .) -}}
{{- else -}}
{{- .Values.serviceAccount.name | default "default" -}}
{{- end -}}
{{- end }}

{{- define "lora-sidecar.priorityClassName" -}}
{{- $class := .Values.priorityClass -}}
{{- if $class.create -}}
{{- /* Its value cannot be changed, so another value is another class. */ -}}
{{- printf "%s-%d" ($class.name | default (printf "%s-%s" .Release.Namespace (include "lora-sidecar.fullname" .))) (int $class.value) -}}
{{- else -}}
{{- $class.name -}}
{{- end -}}
{{- end }}

{{/* A StatefulSet with a disk and one without are two: an upgrade cannot make one of the other. */}}
{{- define "lora-sidecar.workloadName" -}}
{{- include "lora-sidecar.fullname" . -}}
{{- if and (include "lora-sidecar.stateful" .) (not .Values.persistence.enabled) -}}-diskless{{- end -}}
{{- end }}
