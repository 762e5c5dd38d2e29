{{- define "foresee.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 52 | trimSuffix "-" -}}
{{- end -}}

{{- define "foresee.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" -}}
{{- else if contains (include "foresee.name" .) .Release.Name -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "foresee.name" .) | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "foresee.selectorLabels" -}}
app.kubernetes.io/name: {{ include "foresee.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "foresee.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{ include "foresee.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{- define "foresee.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "foresee.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "foresee.image" -}}
{{- with .Values.image.registry }}{{ . }}/{{ end -}}
{{- .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion -}}
{{- end -}}

{{- define "foresee.adminSecret" -}}
{{- .Values.admin.existingSecret | default (printf "%s-admin" (include "foresee.fullname" .)) -}}
{{- end -}}

{{- define "foresee.adminHosts" -}}
{{- $name := printf "%s-admin" (include "foresee.fullname" .) -}}
{{- $names := list $name (printf "%s.%s" $name .Release.Namespace) (printf "%s.%s.svc" $name .Release.Namespace) -}}
{{- concat $names .Values.admin.hosts | join "," -}}
{{- end -}}

{{- /* The values of `config` in TOML. Values of JSON are values of TOML, apart from tables. */ -}}
{{- define "foresee.toml" -}}
{{- range $name, $value := . -}}
{{- if not (and (kindIs "slice" $value) (kindIs "map" (first $value))) -}}
{{ $name }} = {{ $value | mustToRawJson }}
{{ end -}}
{{- end -}}
{{- range $name, $value := . -}}
{{- if and (kindIs "slice" $value) (kindIs "map" (first $value)) -}}
{{- range $table := $value }}
[[{{ $name }}]]
{{ range $key, $setting := $table -}}
{{ $key }} = {{ $setting | mustToRawJson }}
{{ end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- /* Names of the namespaces in which pods may be watched. */ -}}
{{- define "foresee.isClusterWide" -}}
{{- if eq .Values.discovery.kubernetes.namespace "*" }}true{{ end -}}
{{- end -}}
