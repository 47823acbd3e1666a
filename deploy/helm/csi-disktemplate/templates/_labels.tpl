{{- /* The labels of the objects that no manifest has, for the component $component. */ -}}
{{- define "csi-disktemplate.labels" -}}
{app.kubernetes.io/name: csi-disktemplate, app.kubernetes.io/part-of: csi-disktemplate, app.kubernetes.io/managed-by: {{ .root.Release.Service }}, app.kubernetes.io/component: {{ .component }}}
{{- end }}
