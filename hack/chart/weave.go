// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"strings"

	"go.yaml.in/yaml/v3"
)

// clusterWide are the kinds without a namespace.
var clusterWide = map[string]bool{
	"Namespace": true, "CSIDriver": true, "ClusterRole": true, "ClusterRoleBinding": true,
	"StorageClass": true, "VolumeSnapshotClass": true, "StorageProfile": true,
}

// inherit weaves in what kustomize gives to all objects of a directory: labels, and the namespace, which is that of
// the release.
func inherit(u *unit, d *document) error {
	namespaces(d, d.root)
	if u.Namespace != "" && !clusterWide[d.text("/kind")] && d.text("/metadata/namespace") == "" {
		_, metadata := d.find("/metadata")
		d.first(metadata, "namespace: {{ .Release.Namespace }}")
	}
	for _, l := range u.Labels {
		for i := 0; i < len(l.Pairs.Content); i += 2 {
			if err := label(d, l.Pairs.Content[i].Value, l.Pairs.Content[i+1].Value, l.IncludeTemplates); err != nil {
				return err
			}
		}
	}
	return nil
}

// namespaces replaces the manifests' namespace wherever an object names it.
func namespaces(d *document, n *yaml.Node) {
	for i, c := range n.Content {
		if n.Kind == yaml.MappingNode && i%2 == 1 && n.Content[i-1].Value == "namespace" && c.Value == namespace {
			_ = d.replace(c, "{{ .Release.Namespace }}")
		}
		namespaces(d, c)
	}
}

// labelValues are labels whose values are the release's.
var labelValues = map[string]string{
	"app.kubernetes.io/managed-by": "{{ .Release.Service }}",
	"app.kubernetes.io/version":    "{{ " + imageTag + " | quote }}",
}

// label adds a label to an object, and to the pods that it makes.
func label(d *document, key, value string, pods bool) error {
	if v := labelValues[key]; v != "" {
		value = v
	}
	for _, pointer := range []string{"/metadata/labels", "/spec/template/metadata/labels"} {
		_, labels := d.find(pointer)
		if pointer != "/metadata/labels" && (!pods || labels == nil) {
			continue
		}
		if labels == nil {
			return fmt.Errorf("%s: %s has no labels", d.file, d.text("/metadata/name"))
		}
		if _, there := child(labels, key); there != nil {
			continue
		}
		if labels.Style&yaml.FlowStyle == 0 {
			d.first(labels, key+": "+value)
		} else if err := d.more(labels, ", "+key+": "+value); err != nil {
			return err
		}
	}
	return nil
}

// special weaves in the values that no component stands for.
func special(d *document) error {
	kind, name := d.text("/kind"), d.text("/metadata/name")
	for _, r := range replaced {
		_, n := d.find(r.pointer)
		if r.kind != kind || r.name != name {
			continue
		}
		if n == nil {
			return fmt.Errorf("%s has no %s", d.file, r.pointer)
		}
		if err := d.replace(n, r.text); err != nil {
			return err
		}
	}
	switch {
	case kind == "DaemonSet" && name == "plugin":
		plugin(d)
		return pods(d)
	case kind == "DaemonSet":
		if err := sidecars(d); err != nil {
			return err
		}
		return pods(d)
	case kind == "PodMonitor":
		_, labels := d.find("/metadata/labels")
		return d.more(labels, pairsOf(".Values.monitors.labels"))
	}
	return nil
}

// plugin weaves flags, resources and the policy of pulling the image into the plugin's container.
func plugin(d *document) {
	const container = podSpec + "/containers/0"
	_, args := d.find(container + "/args")
	for _, a := range arguments {
		d.add(args, a.condition, "- "+a.argument)
	}
	d.add(args, ".Values.extraArgs", "{{- toYaml .Values.extraArgs | nindent 8 }}")
	key, value := d.find(container + "/resources")
	d.wrap(key, value, "if .Values.resources", ".Values.resources")
	image, _ := d.find(container + "/image")
	pad := indent(image)
	d.insert(image.Line, pad+"{{- with .Values.image.pullPolicy }}", pad+"imagePullPolicy: {{ . }}", pad+"{{- end }}")
}

const sidecarRegistry = "registry.k8s.io/sig-storage/"

// sidecars weaves registry and resources into the sidecars' containers.
func sidecars(d *document) error {
	_, containers := d.find(podSpec + "/containers")
	for _, c := range containers.Content {
		_, image := child(c, "image")
		name, ok := strings.CutPrefix(image.Value, sidecarRegistry)
		if !ok {
			return fmt.Errorf("%s: %s is not from %s", d.file, image.Value, sidecarRegistry)
		}
		if err := d.replace(image, "{{ .Values.sidecars.registry }}/"+name); err != nil {
			return err
		}
		if key, value := child(c, "resources"); value.Kind != yaml.AliasNode {
			d.wrap(key, value, "if .Values.sidecars.resources", ".Values.sidecars.resources")
		}
	}
	return nil
}

// pods weaves in where a DaemonSet's pods run, and with which secrets their images are pulled.
func pods(d *document) error {
	_, spec := d.find(podSpec)
	d.first(spec, "{{- with .Values.image.pullSecrets }}", "imagePullSecrets: {{- toYaml . | nindent 6 }}", "{{- end }}")
	key, value := d.find(podSpec + "/tolerations")
	d.wrap(key, value, `if kindIs "slice" .Values.nodes.tolerations`, ".Values.nodes.tolerations")
	_, selector := d.find(podSpec + "/nodeSelector")
	return d.more(selector, pairsOf(".Values.nodes.selector"))
}

// pairsOf renders a mapping of values as more pairs of a flow mapping.
func pairsOf(values string) string {
	return "{{ range $key, $value := " + values + " }}, {{ $key }}: {{ $value | quote }}{{ end }}"
}
