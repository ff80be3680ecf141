{{/* For the pod of an engine, in this chart and in yours: include each with (index .Subcharts "lora-sidecar"). */}}

{{/* One entry of initContainers: a native sidecar, up before the engine starts and stopped after it has ended. */}}
{{- define "lora-sidecar.sidecar.initContainer" -}}
{{- if ne .Values.mode "sidecar" -}}
{{- fail "lora-sidecar.sidecar.initContainer: set mode: sidecar in the chart's values" -}}
{{- end -}}
{{ include "lora-sidecar.container" . }}
restartPolicy: Always
{{- end }}

{{/* Entries of initContainers after that one, with envoy.enabled: Envoy, which ends after the engine and before the sidecar. */}}
{{- define "lora-sidecar.sidecar.envoyContainers" -}}
{{- include "lora-sidecar.envoyContainers" . -}}
{{- end }}

{{/* Entries of the pod's volumes. */}}
{{- define "lora-sidecar.sidecar.volumes" -}}
{{- include "lora-sidecar.volumes" . -}}
{{- end }}

{{/* Entries of the engine's volumeMounts. */}}
{{- define "lora-sidecar.sidecar.engineMounts" -}}
{{- include "lora-sidecar.sidecar.sharedMounts" . -}}
{{- end }}

{{/* The engine's lifecycle. A native sidecar is stopped after the engine, so it must be empty before the engine goes. */}}
{{- define "lora-sidecar.sidecar.engineLifecycle" -}}
preStop:
  exec:
    command:
      - /bin/sh
      - -c
      - |
        ask() {
          if command -v curl >/dev/null; then
            curl -sS -X POST --max-time {{ add (include "lora-sidecar.drainSeconds" . | int) 5 }} "$1"
          else
            python3 -c 'import sys, urllib.request
        ask = urllib.request.Request(sys.argv[1], method="POST")
        urllib.request.urlopen(ask, timeout={{ add (include "lora-sidecar.drainSeconds" . | int) 5 }})' "$1"
          fi
        }
        {{- if .Values.envoy.enabled }}
        ask http://127.0.0.1:9901/healthcheck/fail
        {{- end }}
        sleep {{ int .Values.preStopSeconds }}
        ask http://127.0.0.1:9004/drain
{{- end }}

{{/* The pod's terminationGracePeriodSeconds: the wait for the balancers, the drain, and the engine's own end. */}}
{{- define "lora-sidecar.sidecar.graceSeconds" -}}
{{- add (int .Values.preStopSeconds) (include "lora-sidecar.drainSeconds" . | int) 10 (int .Values.sidecar.engineStopSeconds) -}}
{{- end }}

{{/* Labels that the pod must have: by them the Service and the NetworkPolicy find it. */}}
{{- define "lora-sidecar.sidecar.podLabels" -}}
{{- include "lora-sidecar.podSelector" . -}}
{{- end }}

{{/* Annotations with which a configuration restarts the pod whose change a running process does not take. */}}
{{- define "lora-sidecar.sidecar.podAnnotations" -}}
checksum/lora-sidecar-config: {{ include "lora-sidecar.fixedConfig" . | sha256sum }}
{{- end }}

{{- define "lora-sidecar.sidecar.sharedMounts" -}}
- {name: lora-sidecar-shm, mountPath: /dev/shm}
{{- if eq .Values.sidecar.kind "vllm" }}
- {name: lora-sidecar-adapters, mountPath: /adapters}
{{- end }}
{{- end }}

{{/* Shared memory has room for the whole store (Triton reads it there) and for what the engine wants for itself. */}}
{{- define "lora-sidecar.sidecar.sharedVolumes" -}}
{{- $engine := include "lora-sidecar.bytes" .Values.sidecar.engineSharedMemory | int64 -}}
- name: lora-sidecar-shm
  emptyDir:
    medium: Memory
    {{- if ne .Values.sidecar.kind "triton" }}
    sizeLimit: {{ $engine | toString | quote }}
    {{- else }}
    sizeLimit: {{ add (include "lora-sidecar.storeBytes" . | int64) $engine | toString | quote }}
    {{- end }}
{{- if eq .Values.sidecar.kind "vllm" }}
- name: lora-sidecar-adapters
  emptyDir: {sizeLimit: {{ .Values.sidecar.adaptersDirSize }}}
{{- end }}
{{- end }}
