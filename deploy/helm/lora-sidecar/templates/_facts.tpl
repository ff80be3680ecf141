{{/* What follows from the values and more than one template needs. "true" or empty, so that `if` can read it. */}}

{{/* Whether there may be more than one replica. */}}
{{- define "lora-sidecar.several" -}}
{{- if and (eq .Values.mode "gateway") (or (gt (int .Values.replicaCount) 1) .Values.autoscaling.enabled) -}}true{{- end -}}
{{- end }}

{{/* Whether replicas know of each other: in gateway mode as soon as they have a Redis. */}}
{{- define "lora-sidecar.clustered" -}}
{{- if and (eq .Values.mode "gateway") (include "lora-sidecar.redisUrl" .) -}}true{{- end -}}
{{- end }}

{{/* Whether the pods keep names and volumes: for a disk, and for certificates, which are made out to names. */}}
{{- define "lora-sidecar.stateful" -}}
{{- if and (eq .Values.mode "gateway") (or .Values.persistence.enabled .Values.tls.replicas.secretName) -}}true{{- end -}}
{{- end }}

{{/* Whether the process asks the Kubernetes API. */}}
{{- define "lora-sidecar.asksKubernetes" -}}
{{- if or (include "lora-sidecar.reconciles" .) (include "lora-sidecar.slices" .) (include "lora-sidecar.asksForKeys" .) -}}true{{- end -}}
{{- end }}

{{/* Whether an issuer's keys are fetched as the pod's service account, as those of the API server are. */}}
{{- define "lora-sidecar.asksForKeys" -}}
{{- range dig "identity" "issuers" list .Values.config -}}
{{- if hasPrefix "/var/run/secrets/kubernetes.io/serviceaccount/" (.jwks_token_file | default "") -}}true{{- end -}}
{{- end -}}
{{- end }}

{{- define "lora-sidecar.reconciles" -}}
{{- if or (include "lora-sidecar.readsConfigMaps" .) .Values.declared.customResources -}}true{{- end -}}
{{- end }}

{{- define "lora-sidecar.readsConfigMaps" -}}
{{- if or .Values.adapters .Values.declared.configMaps -}}true{{- end -}}
{{- end }}

{{/* The namespaces, by commas, whose EndpointSlices are read. */}}
{{- define "lora-sidecar.slices" -}}
{{- $namespaces := list -}}
{{- range .Values.backends -}}
{{- with .discover -}}{{- with .endpoint_slices -}}
{{- $namespaces = append $namespaces (.namespace | default $.Release.Namespace) -}}
{{- end -}}{{- end -}}
{{- end -}}
{{- $namespaces | uniq | sortAlpha | join "," -}}
{{- end }}

{{/* The namespaces, by commas, in which the process deletes pods of engines to restart them. */}}
{{- define "lora-sidecar.restarted" -}}
{{- $namespaces := list -}}
{{- range .Values.backends -}}
{{- $deletes := and .restart (dig "delete_pod" false .restart) (eq (.host_versions_on_limit | default "warn") "drain") -}}
{{- if and $deletes .discover -}}{{- with .discover.endpoint_slices -}}
{{- $namespaces = append $namespaces (.namespace | default $.Release.Namespace) -}}
{{- end -}}{{- end -}}
{{- end -}}
{{- $namespaces | uniq | sortAlpha | join "," -}}
{{- end }}

{{- define "lora-sidecar.redisUrl" -}}
{{- if .Values.redis.bundled.enabled -}}
{{- /* With a user: a Redis that lets everybody in takes a password only along with one. */ -}}
redis://default@{{ include "lora-sidecar.fullname" . }}-redis:6379/0
{{- else -}}
{{- .Values.redis.url -}}
{{- end -}}
{{- end }}

{{/* The Secret with the password of the Redis: the one that is named, or the bundled one's own. */}}
{{- define "lora-sidecar.redisSecret" -}}
{{- if .Values.redis.passwordSecret.name -}}
{{- .Values.redis.passwordSecret.name -}}
{{- else if .Values.redis.bundled.enabled -}}
{{- include "lora-sidecar.fullname" . }}-redis
{{- end -}}
{{- end }}

{{/* Whether operators reach the admin listener from other pods: only where it asks who they are. */}}
{{- define "lora-sidecar.adminIsOpen" -}}
{{- $tls := .Values.tls.admin -}}
{{- if or .Values.admin.tokenSecret.name (and $tls.secretName $tls.clientCa) -}}true{{- end -}}
{{- end }}

{{/* The workload that KEDA scales: the one that is named, or the engines of this chart. */}}
{{- define "lora-sidecar.scaledEngine" -}}
{{- if .Values.engineScaling.target.name -}}
{{- .Values.engineScaling.target.name -}}
{{- else if and (eq .Values.mode "sidecar") .Values.sidecar.engine.enabled -}}
{{- include "lora-sidecar.fullname" . }}-engine
{{- end -}}
{{- end }}

{{/* All of an IP family's addresses. */}}
{{- define "lora-sidecar.anyAddress" -}}
{{- if .Values.ipv6 -}}[::]{{- else -}}0.0.0.0{{- end -}}
{{- end }}

{{- define "lora-sidecar.drainSeconds" -}}
{{- .Values.config.drain_timeout_s | default 300 | int -}}
{{- end }}

{{/* The bytes of a Kubernetes quantity: "512Mi", "2G", 1073741824. Fails for others. */}}
{{- define "lora-sidecar.bytes" -}}
{{- $text := . | toString -}}
{{- if kindIs "float64" . -}}{{- $text = . | int64 | toString -}}{{- end -}}
{{- $units := dict "" 1 "k" 1000 "M" 1000000 "G" 1000000000 "T" 1000000000000 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 -}}
{{- $unit := regexFind "[A-Za-z]*$" $text -}}
{{- $number := trimSuffix $unit $text -}}
{{- if or (not (regexMatch "^[0-9]+(\\.[0-9]+)?$" $number)) (not (hasKey $units $unit)) -}}
{{- fail (printf "%q is not an amount of memory: write 2Gi, 512Mi or bytes" $text) -}}
{{- end -}}
{{- mulf (float64 $number) (index $units $unit) | ceil | int64 -}}
{{- end }}

{{/* The container's resources with the host store's budget on top of the memory: its pages count in the container that
writes them, in shared memory as well. */}}
{{- define "lora-sidecar.resources" -}}
{{- $resources := deepCopy .Values.resources -}}
{{- $store := include "lora-sidecar.storeBytes" . | int64 -}}
{{- range $kind := list "requests" "limits" -}}
{{- with index $resources $kind -}}
{{- if .memory -}}
{{- $_ := set . "memory" (add (include "lora-sidecar.bytes" .memory | int64) $store | toString) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end }}

{{- define "lora-sidecar.storeBytes" -}}
{{- .Values.store.memory_bytes | default 4294967296 | int64 -}}
{{- end }}
