{{/* A RoleBinding of the process's account, from the context, the namespace and the suffix of the Role's name. */}}
{{- define "lora-sidecar.roleBinding" -}}
{{- $context := index . 0 -}}
{{- $name := printf "%s-%s" (include "lora-sidecar.fullname" $context) (index . 2) -}}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata:
  name: {{ $name }}
  namespace: {{ index . 1 }}
  labels:
    {{- include "lora-sidecar.labels" $context | nindent 4 }}
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: Role
  name: {{ $name }}
subjects:
  - kind: ServiceAccount
    name: {{ include "lora-sidecar.serviceAccountName" $context }}
    namespace: {{ $context.Release.Namespace }}
{{- end }}
