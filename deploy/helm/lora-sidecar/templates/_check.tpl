{{/* What the schema cannot say: values that contradict each other. Each message names the way out. */}}
{{- define "lora-sidecar.check" -}}
{{- $redis := include "lora-sidecar.redisUrl" . -}}
{{- if and (include "lora-sidecar.several" .) (not $redis) -}}
{{- fail "several replicas know of each other by a Redis: set redis.url, or redis.bundled.enabled for a trial, or leave replicaCount at 1 and autoscaling off" -}}
{{- end -}}
{{- if and .Values.redis.bundled.enabled .Values.redis.url -}}
{{- fail "redis.url and redis.bundled.enabled are both set: take one out" -}}
{{- end -}}
{{- if and .Values.redis.tlsSecret (not (hasPrefix "rediss" .Values.redis.url)) -}}
{{- fail "redis.tlsSecret is set and redis.url is without TLS: let it begin with rediss" -}}
{{- end -}}
{{- if and .Values.tls.replicas.secretName (not $redis) -}}
{{- fail "tls.replicas.secretName is set and there are no replicas that know of each other: set redis.url" -}}
{{- end -}}
{{- if and .Values.admin.tokenSecret.name (not .Values.tls.admin.secretName) (not .Values.admin.allowCleartext) -}}
{{- fail "admin.tokenSecret.name is set without tls.admin.secretName, so tokens would travel in clear text: name a Secret with tls.crt and tls.key, or set admin.allowCleartext: true where the network encrypts, as a mesh does" -}}
{{- end -}}
{{- range $listener := list "data" "admin" -}}
{{- $tls := index $.Values.tls $listener -}}
{{- if and $tls.clientCa (not $tls.secretName) -}}
{{- fail (printf "tls.%s.clientCa is set without tls.%s.secretName, the Secret with tls.crt, tls.key and ca.crt" $listener $listener) -}}
{{- end -}}
{{- end -}}
{{- with .Values.autoscaling -}}
{{- if and .enabled (lt (int .maxReplicas) (int .minReplicas)) -}}
{{- fail (printf "autoscaling.maxReplicas (%d) is below autoscaling.minReplicas (%d)" (int .maxReplicas) (int .minReplicas)) -}}
{{- end -}}
{{- end -}}
{{- with .Values.engineScaling -}}
{{- if and .enabled (not (include "lora-sidecar.scaledEngine" $)) -}}
{{- fail "engineScaling.enabled needs engineScaling.target.name, the Deployment of the engines" -}}
{{- end -}}
{{- if and .enabled (lt (int .maxReplicas) (int .minReplicas)) -}}
{{- fail (printf "engineScaling.maxReplicas (%d) is below engineScaling.minReplicas (%d)" (int .maxReplicas) (int .minReplicas)) -}}
{{- end -}}
{{- end -}}
{{- if eq .Values.mode "sidecar" -}}
{{- if or .Values.autoscaling.enabled .Values.persistence.enabled -}}
{{- fail "autoscaling and persistence are about gateways; with mode: sidecar there is one sidecar in each engine's pod" -}}
{{- end -}}
{{- if and .Values.sidecar.engine.enabled (not .Values.sidecar.engine.image) -}}
{{- fail "sidecar.engine.enabled needs sidecar.engine.image" -}}
{{- end -}}
{{- else if .Values.sidecar.engine.enabled -}}
{{- fail "sidecar.engine.enabled is set and mode is gateway: set mode: sidecar, or name the engines under backends" -}}
{{- end -}}
{{- include "lora-sidecar.checkIdentity" . -}}
{{- include "lora-sidecar.checkLanes" . -}}
{{- $names := list -}}
{{- range .Values.adapters -}}
{{- if has .name $names -}}
{{- fail (printf "adapters: %s is declared twice" .name) -}}
{{- end -}}
{{- $names = append $names .name -}}
{{- end -}}
{{- if and (eq .Values.mode "gateway") (not .Values.backends) -}}
{{- fail "backends is empty, so the gateway would have no engine to send requests to: name the engines, as in --set 'backends[0].url=triton://HOST:8001', or set mode: sidecar for one beside an engine in its pod" -}}
{{- end -}}
{{- include "lora-sidecar.checkVolume" . -}}
{{- end }}

{{/* A StatefulSet's claims cannot be changed; say so before the API server refuses half of an upgrade. */}}
{{- define "lora-sidecar.checkVolume" -}}
{{- if and (include "lora-sidecar.stateful" .) .Values.persistence.enabled -}}
{{- $name := include "lora-sidecar.fullname" . -}}
{{- $there := lookup "apps/v1" "StatefulSet" .Release.Namespace $name -}}
{{- if $there -}}
{{- $claims := dig "spec" "volumeClaimTemplates" list $there -}}
{{- $way := printf "kubectl -n %s delete statefulset %s --cascade=orphan, grow the claims data-%s-* if the storage class can, and upgrade again" .Release.Namespace $name $name -}}
{{- $spec := (index $claims 0).spec -}}
{{- $wanted := .Values.persistence -}}
{{- if ne (include "lora-sidecar.bytes" $wanted.size) (include "lora-sidecar.bytes" (dig "resources" "requests" "storage" "0" $spec)) -}}
{{- fail (printf "persistence.size is %v and the StatefulSet %s was made with %v, which Kubernetes does not change; %s" $wanted.size $name (dig "resources" "requests" "storage" "0" $spec) $way) -}}
{{- end -}}
{{- if ne $wanted.storageClass (dig "storageClassName" "" $spec) -}}
{{- fail (printf "persistence.storageClass is %q and the StatefulSet %s was made with %q, which Kubernetes does not change; %s" $wanted.storageClass $name (dig "storageClassName" "" $spec) $way) -}}
{{- end -}}
{{- if ne (join "," $wanted.accessModes) (join "," $spec.accessModes) -}}
{{- fail (printf "persistence.accessModes are %s and the StatefulSet %s was made with %s, which Kubernetes does not change; %s" (join "," $wanted.accessModes) $name (join "," $spec.accessModes) $way) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end }}
