// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

// part is a directory of deploy/kubernetes that a value of the chart turns on.
type part struct {
	dir string
	on  string // the template expression that turns it on; empty: always
	// values are literals of its patches and what the chart has in their place.
	values map[string]string
}

// parts are in the order in which their patches are applied, which is that of docs/installing.md.
var parts = []part{
	{dir: "base"},
	{dir: "components/loopback", on: ".Values.pool.loopbackSize", values: map[string]string{
		"=20Gi": "={{ .Values.pool.loopbackSize }}",
		"=60":   "={{ int .Values.pool.maxClaims }}",
	}},
	{dir: "components/claims", on: ".Values.claims.enabled"},
	{dir: "components/snapshots", on: ".Values.snapshots.enabled"},
	{dir: "overlays/kubevirt", on: ".Values.kubevirt.enabled"},
	{dir: "components/prewarm", on: ".Values.prewarm.enabled"},
	{dir: "components/contents", on: ".Values.contents.enabled", values: map[string]string{
		"hostPath: {path: /var/lib/csi-disktemplate-contents,": "hostPath: {path: {{ .Values.contents.directory }},",
	}},
	{dir: "components/goldens", on: ".Values.goldens.enabled"},
	{dir: "components/monitors", on: ".Values.monitors.enabled"},
	{dir: "components/selinux", on: "or .Values.selinux.enabled .Values.openshift.enabled"},
	{dir: "components/openshift", on: ".Values.openshift.enabled"},
	{dir: "components/k0s", values: map[string]string{"/var/lib/k0s/kubelet": "{{ .Values.kubeletDir }}"}},
	{dir: "components/chosen-nodes", on: ".Values.nodes.chosenOnly"},
}

// left are the directories that the chart needs no part for, and why.
var left = map[string]string{
	"components/microk8s":        "patches what k0s patches",
	"components/vm-pool":         "pool.loopbackSize, pool.maxClaims and pool.overcommit",
	"overlays/directory":         "pool.path, and pool.loopbackSize empty",
	"overlays/inline":            "claims.enabled false",
	"overlays/k0s":               "kubeletDir",
	"overlays/kubevirt-one-node": "kubevirt.oneNode",
	"overlays/loopback":          "the values' defaults",
	"overlays/microk8s":          "kubeletDir",
	"overlays/openshift":         "openshift.enabled",
	"overlays/snapshots":         "snapshots.enabled",
}

const (
	podSpec  = "/spec/template/spec"
	imageTag = ".Values.image.tag | default .Chart.AppVersion"

	snapshotOnOneNode = "{{ if .Values.kubevirt.oneNode }}snapshot{{ else }}" // overlays/kubevirt-one-node
)

// replaced are plain scalars of objects and what the chart has in their place.
var replaced = []struct{ kind, name, pointer, text string }{
	{"Namespace", "csi-disktemplate", "/metadata/name", "{{ .Release.Namespace }}"},
	{"DaemonSet", "plugin", podSpec + "/containers/0/image", "{{ .Values.image.repository }}:{{ " + imageTag + " }}"},
	{"DaemonSet", "plugin", podSpec + "/volumes/1/hostPath/path", "{{ .Values.pool.path }}"},
	{"DaemonSet", "plugin", podSpec + "/volumes/1/hostPath/type",
		"{{ if .Values.pool.loopbackSize }}DirectoryOrCreate{{ else }}Directory{{ end }}"},
	{"StorageProfile", "disktemplate-vm", "/spec/cloneStrategy", snapshotOnOneNode + "copy{{ end }}"},
	{"StorageProfile", "disktemplate-vm", "/spec/dataImportCronSourceFormat", snapshotOnOneNode + "pvc{{ end }}"},
	{"StorageProfile", "disktemplate-vm-xfs", "/spec/cloneStrategy", snapshotOnOneNode + "copy{{ end }}"},
	{"StorageProfile", "disktemplate-vm-xfs", "/spec/dataImportCronSourceFormat", snapshotOnOneNode + "pvc{{ end }}"},
	{"StorageProfile", "disktemplate-vm-image", "/spec/cloneStrategy", snapshotOnOneNode + "copy{{ end }}"},
	{"StorageProfile", "disktemplate-vm-image", "/spec/dataImportCronSourceFormat", snapshotOnOneNode + "pvc{{ end }}"},
	{"StorageProfile", "disktemplate-btrfs", "/spec/cloneStrategy", snapshotOnOneNode + "copy{{ end }}"},
	{"StorageProfile", "disktemplate-btrfs", "/spec/dataImportCronSourceFormat", snapshotOnOneNode + "pvc{{ end }}"},
	{"StorageProfile", "disktemplate-ext4", "/spec/cloneStrategy", snapshotOnOneNode + "copy{{ end }}"},
	{"StorageProfile", "disktemplate-ext4", "/spec/dataImportCronSourceFormat", snapshotOnOneNode + "pvc{{ end }}"},
	{"StorageProfile", "disktemplate-xfs", "/spec/cloneStrategy", snapshotOnOneNode + "copy{{ end }}"},
	{"StorageProfile", "disktemplate-xfs", "/spec/dataImportCronSourceFormat", snapshotOnOneNode + "pvc{{ end }}"},
}

// arguments are flags of the plugin that the manifests leave at their defaults.
var arguments = []struct{ condition, argument string }{
	{".Values.pool.headroom", "--headroom={{ .Values.pool.headroom }}"},
	{".Values.pool.nodeHeadroom", "--node-headroom={{ .Values.pool.nodeHeadroom }}"},
	{".Values.pool.overcommit", "--overcommit={{ .Values.pool.overcommit }}"},
	{"and .Values.prewarm.enabled .Values.prewarm.wait", "--wait-for-prewarm"},
}
