{{/* Who clients are: the mode, the Secret with API keys, and what contradicts them. */}}

{{/* off, observe or enforce: what a new installation does if the values do not say. YAML reads a bare off as false. */}}
{{- define "lora-sidecar.identityMode" -}}
{{- $mode := (.Values.identity | default dict).mode -}}
{{- if kindIs "bool" $mode -}}off{{- else -}}{{- $mode | default "enforce" -}}{{- end -}}
{{- end }}

{{- define "lora-sidecar.modeIsDefault" -}}
{{- $mode := (.Values.identity | default dict).mode -}}
{{- if not (or $mode (kindIs "bool" $mode)) -}}true{{- end -}}
{{- end }}

{{/* The Secret with keys.yaml: the one that is named, or the one that the Job makes. None where no API keys are taken. */}}
{{- define "lora-sidecar.keysSecret" -}}
{{- $taken := dig "identity" "keys" true .Values.config -}}
{{- if and $taken (ne (include "lora-sidecar.identityMode" .) "off") -}}
{{- (.Values.identity | default dict).existingSecret | default (printf "%s-keys" (include "lora-sidecar.fullname" .)) -}}
{{- end -}}
{{- end }}

{{- define "lora-sidecar.makesKeys" -}}
{{- if and (include "lora-sidecar.keysSecret" .) (not (.Values.identity | default dict).existingSecret) -}}true{{- end -}}
{{- end }}

{{/* Whether a Job runs before the pods: to make keys, and to look whether a default would meet a running installation. */}}
{{- define "lora-sidecar.hasKeysJob" -}}
{{- if or (include "lora-sidecar.makesKeys" .) (include "lora-sidecar.modeIsDefault" .) -}}true{{- end -}}
{{- end }}

{{- define "lora-sidecar.checkIdentity" -}}
{{- $identity := .Values.identity | default dict -}}
{{- $mode := include "lora-sidecar.identityMode" . -}}
{{- if and .Release.IsUpgrade (include "lora-sidecar.modeIsDefault" .) -}}
{{- fail "identity.mode is not set, and an upgrade does not choose it: set identity.mode to observe, which changes nothing for clients but counts and logs who would be denied, and once nobody would be, to enforce; off believes every client, as releases without identity did" -}}
{{- end -}}
{{- if and (eq $mode "enforce") (include "lora-sidecar.clustered" .) (not .Values.tls.replicas.secretName) -}}
{{- fail "identity.mode is enforce and the replicas' port has no TLS, so who reaches it could send requests in anybody's name: name a Secret with tls.crt, tls.key and ca.crt in tls.replicas.secretName (cert-manager makes such; the chart's README has the Certificate), or set identity.mode: observe until there is one" -}}
{{- end -}}
{{- $given := dig "identity" dict .Values.config -}}
{{- if and (eq $mode "enforce") (dig "certificates" "forwarded" dict $given) (dig "local_admin" true $given) -}}
{{- fail "config.identity.certificates.forwarded is set with local_admin: behind a mesh's proxy every peer has a local address and would be an operator; set config.identity.local_admin: false, and let operators in by admin.tokenSecret" -}}
{{- end -}}
{{- if and $identity.existingSecret (not (include "lora-sidecar.keysSecret" .)) -}}
{{- fail (printf "identity.existingSecret is set and no API keys are taken: %s" (ternary "set identity.mode to observe or enforce" "take config.identity.keys: false out" (eq $mode "off"))) -}}
{{- end -}}
{{- if and (include "lora-sidecar.hasKeysJob" .) (not .Values.rbac.create) -}}
{{- if include "lora-sidecar.makesKeys" . -}}
{{- fail "rbac.create is false, so no Job may make API keys: name a Secret with keys.yaml in identity.existingSecret, or set config.identity.keys: false where tokens or certificates are enough" -}}
{{- end -}}
{{- fail "rbac.create is false, so no Job may look whether this installation runs already: set identity.mode to observe or enforce" -}}
{{- end -}}
{{- end }}
