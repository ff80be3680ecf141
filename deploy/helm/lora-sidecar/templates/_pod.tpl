{{/* What the pods of a Deployment and of a StatefulSet have alike. */}}
{{- define "lora-sidecar.podTemplate" -}}
metadata:
  labels:
    {{- include "lora-sidecar.podSelector" . | nindent 4 }}
    lora-sidecar.io/workload: {{ ternary "stateful" "stateless" (eq (include "lora-sidecar.stateful" .) "true") }}
    {{- with .Values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations:
    checksum/config: {{ include "lora-sidecar.fixedConfig" . | sha256sum }}
    {{- with .Values.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  serviceAccountName: {{ include "lora-sidecar.serviceAccountName" . }}
  automountServiceAccountToken: {{ eq (include "lora-sidecar.asksKubernetes" .) "true" }}
  {{- /* Else a Service called lora-sidecar would set LORA_SIDECAR_PORT, which is read as configuration. */}}
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ add (int .Values.preStopSeconds) (include "lora-sidecar.drainSeconds" . | int) 20 }}
  securityContext:
    runAsNonRoot: true
    runAsUser: {{ .Values.podSecurity.user }}
    runAsGroup: {{ .Values.podSecurity.group }}
    fsGroup: {{ .Values.podSecurity.group }}
    fsGroupChangePolicy: OnRootMismatch
    seccompProfile:
      type: RuntimeDefault
  {{- include "lora-sidecar.scheduling" . | nindent 2 }}
  {{- if .Values.envoy.enabled }}
  initContainers:
    {{- include "lora-sidecar.envoyContainers" . | nindent 4 }}
  {{- end }}
  containers:
    - {{ include "lora-sidecar.container" . | nindent 6 | trim }}
      lifecycle:
        preStop:
          exec:
            {{- /* Whoever balances the load hears of the end of a pod when the pod does: take requests for a while yet. */}}
            {{- if .Values.envoy.enabled }}
            {{- /* And have Envoy close its clients' connections after their answers, so that they go elsewhere. */}}
            command:
              - python
              - -c
              - |
                import time, urllib.request
                try:
                    fail = urllib.request.Request("http://127.0.0.1:9901/healthcheck/fail", method="POST")
                    urllib.request.urlopen(fail, timeout=5)
                finally:
                    time.sleep({{ int .Values.preStopSeconds }})
            {{- else }}
            command: [sleep, {{ .Values.preStopSeconds | quote }}]
            {{- end }}
  volumes:
    {{- include "lora-sidecar.volumes" . | nindent 4 }}
{{- end }}

{{- define "lora-sidecar.scheduling" -}}
{{- include "lora-sidecar.nodes" . }}
{{- with include "lora-sidecar.priorityClassName" . }}
priorityClassName: {{ . }}
{{- end }}
{{- with .Values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.spread.topologyKeys }}
topologySpreadConstraints:
  {{- range . }}
  - maxSkew: 1
    topologyKey: {{ . }}
    whenUnsatisfiable: {{ $.Values.spread.whenUnsatisfiable }}
    labelSelector:
      matchLabels:
        {{- include "lora-sidecar.podSelector" $ | nindent 8 }}
  {{- end }}
{{- end }}
{{- end }}

{{/* Which nodes may run a pod of ours, and how they get the image. */}}
{{- define "lora-sidecar.nodes" -}}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
