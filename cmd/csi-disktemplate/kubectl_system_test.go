// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/internal/harness"
	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/admin"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/health"
)

// standIn is a program in kubectl's place. What it gets are files of its directory, and in the pod plugin-1 it executes
// the real binary on the pool of a plugin that runs. No kubelet answers for plugin-2.
const standIn = `#!/bin/sh
dir=$(dirname "$0")
echo "$*" >>"$dir/calls"
case $1 in
get)
	file=$dir/$(echo "$2" | tr / _)
	if [ -e "$file.denied" ]; then
		echo "Error from server (Forbidden): x is forbidden: User \"dev\" cannot get resource \"${2%%/*}\" in API group \"\" at the cluster scope" >&2
		exit 1
	fi
	cat "$file" 2>/dev/null && exit
	echo "Error from server (NotFound): $2 not found" >&2
	exit 1
	;;
exec)
	if [ "$4" = pod/plugin-2 ]; then
		echo "error: unable to upgrade connection: dial tcp 10.0.0.2:10250: no route to host" >&2
		exit 1
	fi
	while [ "$1" != -- ]; do shift; done
	shift 2
	"$BINARY" "$@" --pool "$POOL"
	code=$?
	[ $code = 0 ] || echo "command terminated with exit code $code" >&2
	exit $code
	;;
*) printf '%s with password=hunter2\nEnvironment:\n  DATABASE:  hunter2\nMounts:\n' "$1" ;;
esac
`

// clustered is a plugin on a cluster that only its objects make one.
type clustered struct {
	*born
	bin string // has kubectl, kubectl-disktemplate, and the objects
}

func startClustered(t *testing.T, b *born) clustered {
	t.Helper()
	c := clustered{b, t.TempDir()}
	if err := errors.Join(os.WriteFile(filepath.Join(c.bin, "kubectl"), []byte(standIn), 0o755),
		os.Symlink(testenv.Binary(t), filepath.Join(c.bin, kubectlName))); err != nil {
		t.Fatal(err)
	}
	c.has("pods", `{"items": [%s, %s, %s]}`, pluginPod("plugin-2", "node2", `{"running": {}}`), pluginPod("plugin-1", "node1", `{"running": {}}`),
		pluginPod("plugin-3", "node3", `{"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}`))
	c.hasDaemonSet(3)
	return c
}

// pluginPod is the plugin's pod on a node.
func pluginPod(name, node, state string) string {
	return fmt.Sprintf(`{"metadata": {"name": %q, "namespace": "csi-disktemplate", "ownerReferences": [{"kind": "DaemonSet", "uid": "set-1", "controller": true}]},
		"spec": {"nodeName": %q, "containers": [{"name": "plugin", "securityContext": {"privileged": true}}]},
		"status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}],
		"containerStatuses": [{"name": "plugin", "restartCount": 1, "state": %s}]}}`, name, node, state)
}

// has gives the cluster an object.
func (c clustered) has(name, format string, a ...any) {
	c.Helper()
	if err := os.WriteFile(filepath.Join(c.bin, strings.ReplaceAll(name, "/", "_")), fmt.Appendf(nil, format, a...), 0o644); err != nil {
		c.Fatal(err)
	}
}

// hasDaemonSet gives it the plugin's DaemonSet, which is to have a pod on some nodes.
func (c clustered) hasDaemonSet(desired int) {
	c.Helper()
	c.has("daemonsets", `{"items": [{"metadata": {"name": "plugin", "namespace": "csi-disktemplate", "uid": "set-1"},
		"status": {"desiredNumberScheduled": %d}}]}`, desired)
}

// hasPod gives it a pod of the namespace shop, on a node or on none, with a volume.
func (c clustered) hasPod(name, node, volume string) {
	c.Helper()
	status := `{"phase": "Pending"}`
	if node == "" {
		status = `{"phase": "Pending", "conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes are available"}]}`
	}
	c.has("pod/"+name, `{"metadata": {"name": %q, "namespace": "shop"}, "spec": {"nodeName": %q, "volumes": [{"name": "data", %s}]}, "status": %s}`,
		name, node, volume, status)
}

// typed runs kubectl disktemplate.
func (c clustered) typed(wantCode int, args ...string) (out, told string) {
	c.Helper()
	cmd := exec.CommandContext(c.Context(), filepath.Join(c.bin, kubectlName), args...)
	cmd.Env = append(os.Environ(), "PATH="+c.bin+":"+os.Getenv("PATH"), "BINARY="+testenv.Binary(c.T), "POOL="+c.Pool)
	cmd.Dir = c.bin
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if code := cmd.ProcessState.ExitCode(); code != wantCode {
		c.Errorf("%v: exit code %d: %v: %s%s", args, code, err, &stdout, &stderr)
	}
	if slices.Contains(args, "json") && strings.Contains(stdout.String(), ": null") {
		c.Errorf("%v: an empty list is null: %s", args, &stdout)
	}
	return stdout.String(), stderr.String()
}

// says checks what a command prints.
func (c clustered) says(wantCode int, args string, want ...string) {
	c.Helper()
	out, told := c.typed(wantCode, strings.Fields(args)...)
	c.Logf("kubectl disktemplate %s\n%s%s", args, out, told)
	for _, w := range want {
		if !strings.Contains(out+told, w) {
			c.Errorf("%s does not say %q", args, w)
		}
	}
}

const inlineVolume = `"csi": {"driver": "csi.disktemplate.io"}`

// TestKubectl asks a real plugin through a kubectl that is none.
func TestKubectl(t *testing.T) {
	c := startClustered(t, startBorn(t, testenv.XFS, "contents:\n- {name: gone, tar: gone.tar, namespaces: [shop]}\n", "--warm-max", "0"))
	c.statusIsShown()
	c.pods()
	c.claims()
	c.permissionsAreNamed()
	c.doctors()
	c.bundles()
	c.strangers()
	c.Kill()
	c.says(0, "status", "csi-disktemplate: no plugin runs on this pool")
	c.has("pods", `{"items": []}`)
	c.says(1, "status", "kubectl disktemplate: the plugin is not installed in this cluster")
	c.says(2, "doctor", "the plugin is not installed in this cluster")
	if err := os.Remove(filepath.Join(c.bin, "kubectl")); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", "/nowhere")
	c.says(1, "status", "kubectl is not on PATH: install it")
}

func (c clustered) statusIsShown() {
	c.Helper()
	out, _ := c.typed(0, "status", "--context", "staging", "-o", "json")
	var s struct{ Nodes []nodeStatus }
	if err := json.Unmarshal([]byte(out), &s); err != nil || len(s.Nodes) != 3 {
		c.Fatalf("%v: %s", err, out)
	}
	one := s.Nodes[0]
	if one.Status == nil {
		c.Fatalf("%+v", one)
	}
	if one.Node != "node1" || one.Pod != "csi-disktemplate/plugin-1" || !one.Ready || one.Status.Plugin.Version != versionName() || one.Status.Plugin.Pool.Size == 0 {
		c.Errorf("%+v", one)
	}
	if calls, err := os.ReadFile(filepath.Join(c.bin, "calls")); err != nil || !strings.Contains(string(calls), "get pods -l "+pluginLabels+" -A -o json --context=staging\n") ||
		!strings.Contains(string(calls), "-c plugin --context=staging -- csi-disktemplate status -o json\n") {
		c.Errorf("%v: kubectl was called with\n%s", err, calls)
	}
	c.says(0, "status", "NODE", "VOLUMES", "WORST", "no answer: kubectl: unable to upgrade connection: dial tcp 10.0.0.2:10250: no route to host",
		"no answer: the plugin does not run: ImagePullBackOff: no such image; see kubectl -n csi-disktemplate describe pod plugin-3")
	if out, _ := c.asked(0, "status"); !strings.Contains(out, "Version") || !strings.Contains(out, "xfs") {
		c.Errorf("on the node: %s", out)
	}
}

// pods have inline volumes, or none.
func (c clustered) pods() {
	c.Helper()
	for id, attributes := range map[string][]string{"named": {"colour", "red"}, "gone": {"content", "gone", "size", "64Mi"}} {
		if _, err := c.publish(id, "ext4", attributes...); err == nil {
			c.Errorf("%s was published", id)
		}
		c.hasPod(id, "node1", inlineVolume)
	}
	v := c.mustPublish("fine", "ext4", "size", "64Mi")
	for name, node := range map[string]string{"fine": "node1", "early": "node1", "nowhere": "", "away": "node2", "lost": "node9"} {
		c.hasPod(name, node, inlineVolume)
	}
	c.hasPod("plain", "node1", `"emptyDir": {}`)
	c.has("events", `{"items": [{"type": "Warning", "reason": "FailedScheduling", "message": "0/3 nodes, again"}]}`)
	c.says(0, "why named -n shop", "shop/named is on node node1.", "waits for 1 of its volumes on node node1", `"colour": unknown`, "request", "correct the volume in the pod's spec")
	c.says(0, "why shop/gone", "gone.tar: no such file", "content")
	c.says(0, "why pod/fine", "waits for no volume on node node1", "published")
	c.says(0, "why early", "kubelet has not asked for its volumes yet: see kubectl -n shop describe pod early")
	c.says(0, "why plain", "shop/plain has no volume of this driver")
	c.says(0, "why nowhere", "shop/nowhere has no node yet: 0/3 nodes are available", "FailedScheduling: 0/3 nodes, again")
	c.says(1, "why away", "node2: kubectl: unable to upgrade connection")
	c.says(1, "why lost", "no plugin runs on node node9; did you mean node1")
	c.says(1, "why missing -n shop", "kubectl get pods -A shows those that are there")
	c.says(1, "why", "name one pod")
	out, _ := c.typed(0, "why", "shop/named", "-o", "json")
	var w podWhy
	if err := json.Unmarshal([]byte(out), &w); err != nil || len(w.Nodes) != 1 || w.Nodes[0].Waits[0].Cause != admin.CauseRequest {
		c.Errorf("%v: %s", err, out)
	}
	c.mustUnpublish(v)
}

// claims have a volume, or are to get one.
func (c clustered) claims() {
	c.Helper()
	r := harness.CreateRequest("pvc-uid-1", 64<<20, harness.Mounted("ext4"), map[string]string{"provisioning": "fat"})
	if _, err := c.client.Create(c.Context(), r); err == nil {
		c.Error("a claim was made")
	}
	v := c.claim("pvc-uid-2", "")
	const annotations = `"annotations": {"volume.kubernetes.io/selected-node": "node1", "volume.kubernetes.io/storage-provisioner": "csi.disktemplate.io"}`
	c.has("persistentvolumeclaim/refused", `{"metadata": {"uid": "uid-1", %s}, "spec": {"storageClassName": "fat"}, "status": {"phase": "Pending"}}`, annotations)
	c.has("persistentvolumeclaim/bound", `{"spec": {"volumeName": "pvc-uid-2"}, "status": {"phase": "Bound"}}`)
	c.has("persistentvolumeclaim/early", `{"metadata": {"uid": "uid-3"}, "spec": {"storageClassName": "ours"}, "status": {"phase": "Pending"}}`)
	c.has("persistentvolumeclaim/other", `{"metadata": {"uid": "uid-4"}, "spec": {"storageClassName": "others"}, "status": {"phase": "Pending"}}`)
	c.has("persistentvolume/pvc-uid-2", `{"spec": {"csi": {"driver": "csi.disktemplate.io", "volumeHandle": %q}}}`, v.ID)
	c.has("storageclass/ours", `{"provisioner": "csi.disktemplate.io"}`)
	c.has("storageclass/others", `{"provisioner": "disk.example.com"}`)
	c.has("events", `{"items": [{"type": "Warning", "reason": "ProvisioningFailed", "message": "fat"}]}`)
	for _, name := range []string{"refused", "bound", "early", "other", "absent"} {
		node := map[bool]string{true: "node1"}[name == "bound"]
		c.hasPod("with-"+name, node, `"persistentVolumeClaim": {"claimName": "`+name+`"}`)
	}
	c.says(0, "why with-refused", "with-refused has no node yet: 0/3", "refused of class fat", "the provisioner of node node1", "ProvisioningFailed: fat", `provisioning "fat"`)
	c.says(0, "why with-bound", "with-bound is on node node1", "bound", "published")
	c.says(0, "why with-early", "nobody yet: the scheduler has chosen no node for it")
	c.says(0, "why with-other", "has no volume of this driver")
	c.says(0, "why with-absent", "the claim does not exist: create it")
	if out, _ := c.typed(0, "why", "with-bound"); strings.Contains(out, "pvc-uid-1") {
		c.Errorf("another claim's failure may be its own:\n%s", out)
	}
	c.end(v)
}

// permissionsAreNamed: somebody who may not do something learns what to ask for.
func (c clustered) permissionsAreNamed() {
	c.Helper()
	c.has("storageclass/ours.denied", "")
	c.says(0, "why with-early", "which driver makes it is not known: you may not get storageclass in the whole cluster: ask for a ClusterRole")
	c.has("persistentvolumeclaim/early.denied", "")
	c.says(0, "why with-early", "early", "unknown", "you may not get persistentvolumeclaim in the whole cluster: ask for a ClusterRole")
	c.has("pods.denied", "")
	c.says(1, "status", "looking for the plugin: you may not get pods in the whole cluster", "name its namespace by --plugin-namespace")
	if err := os.Remove(filepath.Join(c.bin, "pods.denied")); err != nil {
		c.Fatal(err)
	}
}

func (c clustered) doctors() {
	c.Helper()
	c.says(2, "doctor", "node1 (csi-disktemplate/plugin-1): ", "good      pool:", "node2 (csi-disktemplate/plugin-2): broken", "doctor could not look: kubectl: unable to upgrade connection")
	out, _ := c.typed(2, "doctor", "--all-nodes", "-o", "json")
	var d clusterFindings
	if err := json.Unmarshal([]byte(out), &d); err != nil || len(d.Nodes) != 3 || len(d.Nodes[0].Findings.Findings) < 5 || d.Nodes[1].Error == "" {
		c.Errorf("%v: %s", err, out)
	}
	want := map[health.State]int{health.StateGood: 0, health.StateDegraded: exitDegraded, health.StateBroken: exitBroken}[d.Nodes[0].State]
	c.says(want, "doctor --node node1", "node1 (csi-disktemplate/plugin-1): "+string(d.Nodes[0].State))
	const lacks = "the plugin has pods for only 3 of 5 nodes that it is to be on"
	c.says(2, "doctor", "All nodes: good", "the plugin has a pod for each node that it is to be on (3)")
	c.hasDaemonSet(5)
	c.says(2, "doctor", "All nodes: broken", lacks, "do: kubectl -n csi-disktemplate describe daemonset plugin says why")
	c.says(0, "status", lacks)
	c.hasDaemonSet(3)
	c.says(2, "doctor --node node7", "no plugin runs on node node7")
	c.says(2, "doctor --node node1 --all-nodes", "give --node or --all-nodes, not both")
	c.says(2, "doctor -o xml", "--output")
}

// bundles reads what is in one.
func (c clustered) bundles() {
	c.Helper()
	c.says(0, "bundle -o report.tar.gz", "Written to report.tar.gz. Look into it before you send it.", "It lacks:", "no route to host", "No Secret and no ConfigMap was read")
	c.says(1, "bundle -o report.tar.gz", "report.tar.gz exists: give --output another name")
	files := untar(c.T, filepath.Join(c.bin, "report.tar.gz"))
	for name, says := range map[string]string{
		"README.txt": "nodes/", "errors.txt": "nodes/node2/plugin-2/doctor.json: kubectl: unable", "versions.json": "version with password=[removed]",
		"nodes/node1/plugin-1/doctor.json": `"findings"`, "nodes/node1/plugin-1/volumes.json": `"volumes"`, "nodes/node1/plugin-1/contents.json": `"gone"`,
		"nodes/node1/plugin-1/status.json": versionName(), "logs/csi-disktemplate/plugin-1/plugin.previous.log": "logs", "cluster/pods-described.txt": "describe",
		"cluster/csinodes-described.txt": "describe", "cluster/events-csi-disktemplate.txt": "ProvisioningFailed",
	} {
		if !strings.Contains(files["report/"+name], says) {
			c.Errorf("%s: %s, want %s", name, files["report/"+name], says)
		}
	}
	for name, text := range files {
		if strings.Contains(text, "password=hunter2") {
			c.Errorf("%s has a password", name)
		}
	}
	for _, kind := range []string{"pods", "daemonsets"} {
		if text := files["report/cluster/"+kind+"-described.txt"]; !strings.Contains(text, "DATABASE:  [removed]\nMounts:") {
			c.Errorf("%s: %s", kind, text)
		}
	}
	if calls, err := os.ReadFile(filepath.Join(c.bin, "calls")); err != nil || !strings.Contains(string(calls), "describe pods -l "+projectLabel+" -n csi-disktemplate\n") ||
		!strings.Contains(string(calls), "-c plugin --timestamps --tail=20000 --limit-bytes=16777216\n") {
		c.Errorf("%v: kubectl was called with\n%s", err, calls)
	}
}

// strangers: what a pod says that somebody else gave the plugin's labels, nobody is shown.
func (c clustered) strangers() {
	c.Helper()
	ours := pluginPod("plugin-1", "node1", `{"running": {}}`)
	c.has("pods", `{"items": [%s, %s]}`, ours, strings.ReplaceAll(ours, "csi-disktemplate", "shop"))
	c.has("calls", "")
	c.says(1, "why fine", "pods with the plugin's labels are in several namespaces: csi-disktemplate, shop; ")
	c.says(2, "doctor", "in several namespaces")
	if calls, err := os.ReadFile(filepath.Join(c.bin, "calls")); err != nil || strings.Contains(string(calls), "exec") {
		c.Errorf("%v: a pod was asked:\n%s", err, calls)
	}
	c.has("pods", `{"items": [%s]}`, ours)
}

func untar(t testing.TB, name string) map[string]string {
	t.Helper()
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]string{}
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if err == io.EOF {
			return files
		}
		b, readErr := io.ReadAll(r)
		if err := errors.Join(err, readErr); err != nil {
			t.Fatal(err)
		}
		files[h.Name] = string(b)
	}
}
