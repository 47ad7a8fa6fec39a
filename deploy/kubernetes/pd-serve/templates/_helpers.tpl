{{- define "pd-serve.name" -}}
{{- if contains "pd-serve" .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}{{ else }}{{ printf "%s-pd-serve" .Release.Name | trunc 40 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- /* What selects pods: never changes. Of (dict "root" $ "component" NAME). */ -}}
{{- define "pd-serve.selector" -}}
app.kubernetes.io/name: pd-serve
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "pd-serve.labels" -}}
{{ include "pd-serve.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version }}
{{- end }}

{{- define "pd-serve.secret" -}}
{{ .Values.nodeSecret.existingSecret | default (printf "%s-nodes" (include "pd-serve.name" .)) }}
{{- end }}

{{- define "pd-serve.account" -}}
{{ .Values.serviceAccount.name | default (printf "%s-router" (include "pd-serve.name" .)) }}
{{- end }}

{{- /* pd-serve's own file of settings. Of (dict "settings" MAP "own" LIST): those that the chart gives as flags are refused. */ -}}
{{- define "pd-serve.settings" -}}
{{- range .own }}{{- if hasKey $.settings . }}{{ fail (printf "settings.%s is the chart's to set: see values.yaml" .) }}{{ end }}{{- end }}
{{- toYaml .settings }}
{{- end }}

{{- /* TLS of a container, where there is any: flags, mount, volume. Of the chart's root. */ -}}
{{- define "pd-serve.tls.flags" -}}
- --ssl-certfile=/run/secrets/pd-serve-tls/tls.crt
- --ssl-keyfile=/run/secrets/pd-serve-tls/tls.key
- --ssl-ca=/run/secrets/pd-serve-tls/ca.crt
{{- end }}

{{- define "pd-serve.tls.mount" -}}
- {name: tls, mountPath: /run/secrets/pd-serve-tls, readOnly: true}
{{- end }}

{{- define "pd-serve.tls.volume" -}}
- {name: tls, secret: {secretName: {{ .Values.tls.existingSecret }}, defaultMode: 0400}}
{{- end }}

{{- /* Of (dict "path" PATH "root" $). A kubelet verifies no certificate. */ -}}
{{- define "pd-serve.probes.http" -}}
httpGet: {path: {{ .path }}, port: http{{ if .root.Values.tls.existingSecret }}, scheme: HTTPS{{ end }}}
timeoutSeconds: 3
{{- end }}
