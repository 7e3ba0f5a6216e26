{{/* Labels of every object, written for four blanks of indentation: `include` and `nindent` are not needed. */}}
{{- define "culvert.labels" }}
    app.kubernetes.io/part-of: culvert
    app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
    app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}
