// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build e2e

// Package e2e tests the plugin as its users run it: with the manifests that they apply, on a real Kubernetes of one node
// (hack/kube/cluster).
package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/internal/harness"
	"github.com/csi-disktemplate/csi-disktemplate/internal/loops"
)

const (
	namespace = "csi-disktemplate"
	examples  = "deploy/kubernetes/examples"
	manifests = "deploy/kubernetes/overlays/snapshots" // what most tests run on: the usual install, and snapshots

	// patience is for kubelet and the controllers, which back off for up to a minute.
	patience = 3 * time.Minute

	suiteProcs = 18 // tests of the suite wait most of the time, so that many can run at once
)

// root is the repository's directory.
var root = func() string {
	dir, err := filepath.Abs("../../..")
	if err != nil {
		panic(err)
	}
	return dir
}()

// stateDir is where the cluster keeps everything.
func stateDir() string {
	if dir := os.Getenv("STATE"); dir != "" {
		return dir
	}
	return "/var/tmp/csi-disktemplate-kube"
}

// cluster runs hack/kube/cluster.
func cluster(input string, args ...string) (string, error) {
	cmd := exec.Command(filepath.Join(root, "hack/kube/cluster"), args...)
	cmd.Stdin = strings.NewReader(input)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("cluster %s: %w: %s", strings.Join(args, " "), err, &stderr)
	}
	return stdout.String(), nil
}

// must runs hack/kube/cluster. A failure ends the test.
func must(t testing.TB, args ...string) string {
	t.Helper()
	out, err := cluster("", args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// on runs a command on the node.
func on(t testing.TB, args ...string) string {
	t.Helper()
	return must(t, append([]string{"run"}, args...)...)
}

// kubectl runs kubectl on the node.
func kubectl(t testing.TB, args ...string) string {
	t.Helper()
	return must(t, append([]string{"kubectl"}, args...)...)
}

// apply applies a manifest, and deletes it when the test ends. It does not wait for that; mustBeClean does.
func apply(t testing.TB, manifest string) {
	t.Helper()
	if _, err := cluster(manifest, "kubectl", "apply", "-f", "-"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if _, err := cluster(manifest, "kubectl", "delete", "--ignore-not-found", "--wait=false", "-f", "-"); err != nil {
			t.Error(err)
		}
	})
}

// remove deletes what a manifest made, and waits until it is gone.
func remove(t testing.TB, manifest string) {
	t.Helper()
	if _, err := cluster(manifest, "kubectl", "delete", "--ignore-not-found", "--timeout="+patience.String(), "-f", "-"); err != nil {
		t.Error(err)
	}
}

// example reads a manifest that users apply.
func example(t testing.TB, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(root, examples, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// ready waits until pods are ready.
func ready(t testing.TB, pods ...string) {
	t.Helper()
	for _, pod := range pods {
		if _, err := cluster("", "kubectl", "wait", "--for=condition=Ready", "pod/"+pod, "--timeout="+patience.String()); err != nil {
			t.Fatalf("%v\n%s", err, kubectl(t, "describe", "pod", pod))
		}
	}
}

// eventually polls until a text contains everything that it should.
func eventually(t testing.TB, what string, get func() string, says ...string) string {
	t.Helper()
	var got string
	for deadline := time.Now().Add(patience); ; time.Sleep(200 * time.Millisecond) {
		got = get()
		missing := ""
		for _, s := range says {
			if !strings.Contains(got, s) {
				missing = s
			}
		}
		if missing == "" {
			return got
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s does not say %q:\n%s", what, missing, got)
		}
	}
}

// events returns the events of an object.
func events(t testing.TB, name string) string {
	t.Helper()
	return kubectl(t, "get", "events", "--field-selector", "involvedObject.name="+name, "-o", `jsonpath={range .items[*]}{.reason}: {.message}{"\n"}{end}`)
}

// get returns an object's field.
func get(t testing.TB, object, field string) string {
	t.Helper()
	return kubectl(t, "get", strings.Fields(object)[0], strings.Fields(object)[1], "-o", "jsonpath={"+field+"}")
}

// plugin returns the name of the plugin's pod.
func plugin(t testing.TB) string {
	t.Helper()
	return strings.TrimSpace(kubectl(t, "get", "pod", "-n", namespace, "-l", "app.kubernetes.io/component=plugin", "-o", "jsonpath={.items[0].metadata.name}"))
}

// pluginReady waits until the DaemonSet's latest version runs.
func pluginReady(t testing.TB) {
	t.Helper()
	kubectl(t, "rollout", "status", "-n", namespace, "daemonset/plugin", "--timeout="+patience.String())
}

// freshSidecars replaces the sidecars' pods. Sidecars end whenever the plugin does, and kubelet waits longer each time
// before it starts them again.
func freshSidecars(t testing.TB) {
	t.Helper()
	for _, name := range []string{"claims", "snapshots"} {
		if _, err := cluster("", "kubectl", "rollout", "restart", "-n", namespace, "daemonset/"+name); err != nil {
			t.Error(err)
		}
	}
	if err := install(); err != nil {
		t.Error(err)
	}
}

// poolLoops returns the loop devices of the cluster's pool and of everything on it: volumes, and the block volumes that
// kubelet holds. Whatever else is attached on this machine belongs to somebody else.
func poolLoops(t testing.TB) (pool, volumes []loops.Device) {
	t.Helper()
	init, err := os.ReadFile(filepath.Join(stateDir(), "init.pid"))
	if err != nil {
		t.Fatal(err)
	}
	image, err := loops.FileOf(filepath.Join("/proc", strings.TrimSpace(string(init)), "root/var/lib/csi-disktemplate/pool.img"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil // the plugin has not made it yet
	}
	if err != nil {
		t.Fatal(err)
	}
	devices, err := loops.List()
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range loops.Above(devices, image) {
		if d.Backing == image {
			pool = append(pool, d)
		} else {
			volumes = append(volumes, d)
		}
	}
	return pool, volumes
}

// residue lists what volumes leave on the node: images, mounts, loop devices. Templates, the pool's own mount and its
// loop device do not count.
func residue(t testing.TB) string {
	t.Helper()
	left := on(t, "sh", "-c", `
		grep -E ' /var/lib/kubelet/(pods/[^ ]*/volumes/kubernetes.io~csi|plugins/kubernetes.io/csi)/' /proc/1/mountinfo | cut -d' ' -f5
		pid=$(pgrep -f '^/usr/bin/csi-disktemplate --node-id' | head -1)
		[ -n "$pid" ] || echo "the pool cannot be seen: no plugin runs"
		[ -z "$pid" ] || find /proc/$pid/root/var/lib/csi-disktemplate/mnt/volumes /proc/$pid/root/var/lib/csi-disktemplate/mnt/snapshots -type f
		true`)
	_, volumes := poolLoops(t)
	for _, d := range volumes {
		if d.Label != harness.ReadyLabel { // of volumes that are kept ready, and of such that have an image or a mount above
			left += fmt.Sprintln(d)
		}
	}
	return left
}

// mustBeClean waits until no volume is left on the node.
func mustBeClean(t testing.TB) {
	t.Helper()
	var left string
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(500 * time.Millisecond) {
		if left = residue(t); left == "" {
			return
		}
	}
	t.Errorf("left on the node:\n%s", left)
}

// pod makes the manifest of a pod that runs a shell command with a volume at /data.
func pod(name, command, volume string) string {
	return fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: %s}
spec:
  terminationGracePeriodSeconds: 1
  restartPolicy: Always
  containers:
  - name: main
    image: busybox:1.37
    command: [sh, -c, %q]
    volumeMounts:
    - {name: data, mountPath: /data}
  volumes:
  - name: data
    %s
---
`, name, command, volume)
}

// inline makes the manifest of a pod with an inline volume.
func inline(name, fsType, attributes string) string {
	return pod(name, "echo hello > /data/hello && sleep infinity",
		fmt.Sprintf("csi: {driver: csi.disktemplate.io, fsType: %s, volumeAttributes: {%s}}", fsType, attributes))
}

// claim makes the manifest of a claim of a class, and of a pod that uses it.
func claim(name, class, size string) string {
	return fmt.Sprintf(`
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: %s}
spec: {storageClassName: %s, accessModes: [ReadWriteOnce], resources: {requests: {storage: %s}}}
---`, name, class, size) + pod(name, "date >> /data/starts && sync && sleep infinity", fmt.Sprintf("persistentVolumeClaim: {claimName: %s}", name))
}

// ephemeral makes a pod's volume whose claim is made for that pod.
func ephemeral(class, size string) string {
	return fmt.Sprintf("ephemeral: {volumeClaimTemplate: {spec: {storageClassName: %s, accessModes: [ReadWriteOnce], resources: {requests: {storage: %s}}}}}", class, size)
}

// pluginPage returns a page of the plugin, which must answer 200.
func pluginPage(t testing.TB, name string) string {
	t.Helper()
	ip := kubectl(t, "get", "pod", "-n", namespace, plugin(t), "-o", "jsonpath={.status.podIP}")
	return on(t, "wget", "-q", "-O-", "http://"+ip+":9808/"+name)
}

// metric sums a counter of the plugin over its labels.
func metric(t testing.TB, series string) float64 {
	t.Helper()
	var sum float64
	for line := range strings.Lines(pluginPage(t, "metrics")) {
		if strings.HasPrefix(line, series) {
			var v float64
			fmt.Sscan(line[strings.LastIndex(line, " "):], &v)
			sum += v
		}
	}
	return sum
}

// decode reads JSON.
func decode(t testing.TB, text string, into any) {
	t.Helper()
	if err := json.Unmarshal([]byte(text), into); err != nil {
		t.Fatalf("%v in\n%s", err, text)
	}
}

// install applies the manifests that users apply, and waits until everything runs.
func install() error {
	for _, args := range [][]string{
		{"apply", "-k", filepath.Join(root, manifests)},
		{"rollout", "status", "-n", namespace, "daemonset/plugin", "--timeout=" + patience.String()},
		{"rollout", "status", "-n", namespace, "daemonset/claims", "--timeout=" + patience.String()},
		{"rollout", "status", "-n", namespace, "daemonset/snapshots", "--timeout=" + patience.String()},
	} {
		if _, err := cluster("", append([]string{"kubectl"}, args...)...); err != nil {
			return err
		}
	}
	return nil
}

func TestMain(m *testing.M) {
	if err := install(); err != nil {
		fmt.Fprintf(os.Stderr, "installing the plugin (`make cluster` starts what these tests need): %v\n", err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}
