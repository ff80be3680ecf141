{{/* Who carries the bytes of answers: the sidecar, an Envoy in its pod, or a gateway that has it pick. */}}

{{/* Where the endpoint picker listens; empty without one. In sidecar mode the drain listener has 9004. */}}
{{- define "lora-sidecar.pickerAddress" -}}
{{- $given := dig "listeners" "endpoint_picker" "address" "" .Values.config -}}
{{- if $given -}}
{{- $given -}}
{{- else if .Values.inferencePool.create -}}
{{- include "lora-sidecar.anyAddress" . }}:9004
{{- else if .Values.envoy.enabled -}}
127.0.0.1:{{ ternary 9006 9004 (eq .Values.mode "sidecar") }}
{{- end -}}
{{- end }}

{{- define "lora-sidecar.pickerPort" -}}
{{- include "lora-sidecar.pickerAddress" . | regexFind "[0-9]+$" -}}
{{- end }}

{{/* Entries of initContainers. Envoy is a native sidecar: it is there before the process and until the process has drained,
so answers that run go on through it. Its image has no shell that could wait in a preStop hook. */}}
{{- define "lora-sidecar.envoyContainers" -}}
{{- $folder := printf "%s/envoy" (include "lora-sidecar.etc" .) -}}
- name: lora-sidecar-envoy-config
  image: {{ include "lora-sidecar.image" . }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  {{- /* The process's own environment: it is configuration as well. */}}
  env:
    {{- include "lora-sidecar.env" . | nindent 4 }}
  {{- with .Values.envFrom }}
  envFrom:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  command:
    - /bin/sh
    - -c
    - >-
      exec sidecar envoy config {{ include "lora-sidecar.etc" . }}/config/config.yaml
      --port 8080 --admin-port 9901 --ready-port 9902
      {{- if .Values.ipv6 }} --host ::{{ end }}
      {{- if .Values.tls.picker.secretName }} --ca {{ $folder }}-ca/ca.crt{{ end }}
      >{{ $folder }}/envoy.yaml
  resources:
    requests: {cpu: 50m, memory: 128Mi}
    limits: {memory: 256Mi}
  securityContext:
    {{- include "lora-sidecar.ownSecurity" . | nindent 4 }}
  volumeMounts:
    - {name: {{ include "lora-sidecar.volumePrefix" . }}config, mountPath: {{ include "lora-sidecar.etc" . }}/config, readOnly: true}
    - {name: {{ include "lora-sidecar.volumePrefix" . }}tmp, mountPath: /tmp}
    - {name: {{ include "lora-sidecar.volumePrefix" . }}envoy, mountPath: {{ $folder }}}
- name: lora-sidecar-envoy
  image: {{ .Values.envoy.image }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  restartPolicy: Always
  command: [/usr/local/bin/envoy]
  args:
    - --config-path
    - {{ $folder }}/envoy.yaml
    - --disable-hot-restart
    - --concurrency
    - {{ .Values.envoy.threads | quote }}
    {{- with .Values.envoy.extraArgs }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  ports:
    - {name: http-envoy, containerPort: 8080}
    - {name: envoy-ready, containerPort: 9902}
  {{- /* Envoy's administration can end it and is on loopback, where the kubelet does not come, and the image has no program to
  ask it from within: a listener of its own passes on /ready, and nothing else. /live is answered by a worker. */}}
  startupProbe:
    httpGet: {path: /ready, port: envoy-ready}
    periodSeconds: 1
    failureThreshold: 60
  livenessProbe:
    httpGet: {path: /live, port: envoy-ready}
    periodSeconds: 10
    timeoutSeconds: 5
    failureThreshold: {{ max 1 (div (int .Values.probes.livenessSeconds) 10) }}
  readinessProbe:
    httpGet: {path: /ready, port: envoy-ready}
    periodSeconds: {{ .Values.probes.readinessSeconds }}
    timeoutSeconds: 3
    failureThreshold: 2
  {{- with .Values.envoy.resources }}
  resources:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  securityContext:
    {{- include "lora-sidecar.ownSecurity" . | nindent 4 }}
  volumeMounts:
    - {name: {{ include "lora-sidecar.volumePrefix" . }}envoy, mountPath: {{ $folder }}, readOnly: true}
    {{- if .Values.tls.picker.secretName }}
    - {name: {{ include "lora-sidecar.volumePrefix" . }}envoy-ca, mountPath: {{ $folder }}-ca, readOnly: true}
    {{- end }}
{{- end }}

{{- define "lora-sidecar.envoyVolumes" -}}
- name: {{ include "lora-sidecar.volumePrefix" . }}envoy
  emptyDir: {sizeLimit: 1Mi}
{{- /* Not the key: Envoy only has to know the picker. */}}
{{- with .Values.tls.picker.secretName }}
- name: {{ include "lora-sidecar.volumePrefix" $ }}envoy-ca
  secret: {secretName: {{ . }}, defaultMode: 0440, items: [{key: ca.crt, path: ca.crt}]}
{{- end }}
{{- end }}

{{/* By which name gateways of Istio know the picker's Service. */}}
{{- define "lora-sidecar.pickerHost" -}}
{{- $service := printf "%s-picker.%s.svc.cluster.local" (include "lora-sidecar.fullname" .) .Release.Namespace -}}
{{- .Values.istio.destinationRule.host | default $service -}}
{{- end }}

{{- define "lora-sidecar.checkLanes" -}}
{{- $address := include "lora-sidecar.pickerAddress" . -}}
{{- if and .Values.tls.picker.secretName (not $address) -}}
{{- fail "tls.picker.secretName is set and there is no endpoint picker: set inferencePool.create" -}}
{{- end -}}
{{- if .Values.envoy.enabled -}}
{{- if hasPrefix "unix:" $address -}}
{{- fail "envoy.enabled is set and config.listeners.endpoint_picker.address is a socket file: take it out, or name HOST:PORT" -}}
{{- end -}}
{{- if and .Values.tls.http.secretName (not .Values.envoy.allowCleartext) -}}
{{- fail "envoy.enabled is set and tls.http.secretName, and Envoy's port has no TLS, so what tls.http protects would travel in clear text there: set envoy.allowCleartext: true where the network encrypts, as a mesh does, or take one out" -}}
{{- end -}}
{{- end -}}
{{- if .Values.inferencePool.create -}}
{{- if eq .Values.mode "sidecar" -}}
{{- fail "inferencePool.create is set and mode is sidecar, where an engine's address is 127.0.0.1, which no gateway reaches: set mode: gateway" -}}
{{- end -}}
{{- if not .Values.inferencePool.matchLabels -}}
{{- fail "inferencePool.create needs inferencePool.matchLabels, the labels of the engines' pods in this namespace" -}}
{{- end -}}
{{- if or (hasPrefix "unix:" $address) (regexMatch "^(127\\.|localhost:|\\[::1\\])" $address) -}}
{{- fail (printf "inferencePool.create is set and config.listeners.endpoint_picker.address is %s, which no gateway reaches: take it out" $address) -}}
{{- end -}}
{{- if and .Values.networkPolicy.enabled (not .Values.networkPolicy.gateways) -}}
{{- fail "inferencePool.create is set and networkPolicy.gateways is empty, so no gateway would reach the endpoint picker: name the gateway's pods there" -}}
{{- end -}}
{{- range .Values.backends -}}
{{- $namespace := dig "discover" "endpoint_slices" "namespace" "" . -}}
{{- if and $namespace (ne $namespace $.Release.Namespace) -}}
{{- fail (printf "inferencePool.create is set and engines are discovered in namespace %s: an InferencePool has pods of its own namespace only, so install the chart there" $namespace) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- with .Values.istio.destinationRule -}}
{{- if .create -}}
{{- if not (and $.Values.inferencePool.create $.Values.tls.picker.secretName) -}}
{{- fail "istio.destinationRule.create has the gateway speak TLS to the endpoint picker: set inferencePool.create and tls.picker.secretName" -}}
{{- end -}}
{{- $ways := compact (list .caCertificates .credentialName (ternary "skip" "" .insecureSkipVerify)) -}}
{{- if ne (len $ways) 1 -}}
{{- fail "istio.destinationRule.create needs one way to know the endpoint picker: caCertificates, credentialName, or insecureSkipVerify: true" -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end }}
