// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build e2e

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// TestExamples applies each example as it is written, in the order that the examples give.
func TestExamples(t *testing.T) {
	t.Cleanup(func() { mustBeClean(t) })
	type applied struct{ file, pod, says string }
	for _, together := range [][]applied{{
		{"inline.yaml", "inline", "/scratch"},
		{"volatile.yaml", "volatile", "committed 100 rows"},
		{"generic-ephemeral.yaml", "generic-ephemeral", "/scratch"},
		{"claim.yaml", "claim", "UTC"},
		{"block.yaml", "block", "hello"},
		{"disk-image.yaml", "disk-image", "1073741824"},
	}, { // made of the claim
		{"snapshot-restore.yaml", "restored", "UTC"},
		{"clone.yaml", "cloned", "UTC"},
	}} {
		for _, e := range together {
			apply(t, example(t, e.file))
		}
		for _, e := range together {
			ready(t, e.pod)
			eventually(t, "the log of "+e.pod, func() string { return kubectl(t, "logs", e.pod) }, e.says)
		}
	}
	// The example says how a claim grows.
	kubectl(t, "patch", "pvc", "data", "--patch", `{"spec": {"resources": {"requests": {"storage": "2Gi"}}}}`)
	eventually(t, "the claim", func() string { return get(t, "pvc data", ".status.capacity.storage") }, "2Gi")
	eventually(t, "df", func() string {
		return kubectl(t, "exec", "claim", "--", "sh", "-c", `df -m /data | awk 'END {print ($2 > 1900 ? "has grown: " : "is as it was: ") $0}'`)
	}, "has grown")

	// There are no others than these, and those of contents, which TestDatabasePerTest and TestVMs apply. Those of
	// goldens are in a directory of their own, see TestGoldenExamples.
	files, err := filepath.Glob(filepath.Join(root, examples, "*.yaml"))
	if err != nil || len(files) != 10 {
		t.Errorf("expected 10 examples, found %s: %v", strings.Join(files, ", "), err)
	}
}

// TestPodsAtOnce starts ten pods at once, all with volumes of one template that does not exist yet.
func TestPodsAtOnce(t *testing.T) {
	t.Cleanup(func() { mustBeClean(t) })
	misses := metric(t, "csi_disktemplate_template_build_duration_seconds_count")
	var all string
	var names []string
	label := fmt.Sprintf("t%d", time.Now().Unix())
	for i := range 10 {
		name := fmt.Sprintf("at-once-%d", i)
		all += inline(name, "ext4", "size: 64Mi, label: "+label)
		names = append(names, name)
	}
	apply(t, all)
	ready(t, names...)
	if built := metric(t, "csi_disktemplate_template_build_duration_seconds_count") - misses; built != 1 {
		t.Errorf("%g templates were built, expected 1", built)
	}
}

// writer is a pod that writes and syncs again and again, and ends at the first failure.
func writer(name, volume string) string {
	p := pod(name, "i=0; while i=$((i+1)); do echo $i > /data/f && sync /data/f && [ $(cat /data/f) = $i ] || { echo failed at $i; exit 1; }; echo $i; sleep 0.05; done", volume)
	return strings.Replace(p, "restartPolicy: Always", "restartPolicy: Never", 1)
}

// TestUpgrade deletes the plugin's pod, and then changes its image, while pods write.
func TestUpgrade(t *testing.T) {
	t.Cleanup(func() { freshSidecars(t); mustBeClean(t) })
	pods := writer("writes-inline", `csi: {driver: csi.disktemplate.io, fsType: xfs, volumeAttributes: {size: 300Mi}}`) +
		writer("writes-claim", ephemeral("disktemplate-ext4", "64Mi"))
	apply(t, pods)
	names := []string{"writes-inline", "writes-claim"}
	ready(t, names...)
	progress := func() (at []int) {
		for _, name := range names {
			log := strings.Fields(kubectl(t, "logs", "--tail=1", name))
			n, err := strconv.Atoi(log[len(log)-1])
			if err != nil {
				t.Fatalf("%s: %q: %v", name, log, err)
			}
			at = append(at, n)
		}
		return at
	}
	mustGoOn := func(after string) {
		t.Helper()
		before := progress()
		time.Sleep(2 * time.Second)
		for i, n := range progress() {
			if n <= before[i] {
				t.Errorf("after %s, %s no longer writes: it stands at %d", after, names[i], n)
			}
		}
	}
	mustGoOn("the start")

	old := plugin(t)
	kubectl(t, "delete", "pod", "-n", namespace, old)
	pluginReady(t)
	mustGoOn("a new pod of the plugin")

	image := kubectl(t, "get", "daemonset", "-n", namespace, "plugin", "-o", "jsonpath={.spec.template.spec.containers[0].image}")
	next := strings.Split(image, ":")[0] + ":next"
	on(t, "ctr", "--address", filepath.Join(stateDir(), "containerd.sock"), "--namespace", "k8s.io", "image", "tag", "--force", image, next)
	t.Cleanup(func() {
		if _, err := cluster("", "kubectl", "set", "image", "-n", namespace, "daemonset/plugin", "plugin="+image); err != nil {
			t.Error(err)
		}
		if _, err := cluster("", "kubectl", "rollout", "status", "-n", namespace, "daemonset/plugin", "--timeout=120s"); err != nil {
			t.Error(err)
		}
	})
	kubectl(t, "set", "image", "-n", namespace, "daemonset/plugin", "plugin="+next)
	pluginReady(t)
	mustGoOn("the upgrade")
	eventually(t, "what the new plugin keeps ready", func() string {
		return fmt.Sprintf("some are ready: %v", metric(t, "csi_disktemplate_warm_volumes") > 0)
	}, "some are ready: true")
	if built := metric(t, "csi_disktemplate_template_build_duration_seconds_count"); built != 0 {
		t.Errorf("the new plugin built %g templates that were there", built)
	}
	remove(t, pods) // the new plugin unpublishes what the old one published
	mustBeClean(t)
}

// TestKubeletRestarts kills kubelet, which the node starts again, while there are volumes.
func TestKubeletRestarts(t *testing.T) {
	t.Cleanup(func() { mustBeClean(t) })
	apply(t, writer("writes", `csi: {driver: csi.disktemplate.io, fsType: ext4, volumeAttributes: {size: 64Mi}}`))
	ready(t, "writes")
	pid := func() string { return strings.TrimSpace(on(t, "cat", filepath.Join(stateDir(), "pids/kubelet"))) }
	old := pid()
	before := strings.Count(kubectl(t, "logs", "-n", namespace, plugin(t)), `"Registered with kubelet"`)
	on(t, "kill", "-KILL", old)
	eventually(t, "the registration", func() string {
		log, _ := cluster("", "kubectl", "logs", "-n", namespace, plugin(t)) // it is kubelet that serves logs
		return fmt.Sprintf("%d times, kubelet is new: %v", strings.Count(log, `"Registered with kubelet"`), pid() != old)
	}, "kubelet is new: true", strconv.Itoa(before+1)+" times")
	apply(t, inline("after-restart", "ext4", "size: 64Mi"))
	ready(t, "after-restart", "writes")
	if log := kubectl(t, "logs", "writes"); strings.Contains(log, "failed") {
		t.Error(log)
	}
}

// TestReboot takes from the node everything that a power cut takes.
func TestReboot(t *testing.T) {
	t.Cleanup(func() { mustBeClean(t) })
	names := []string{"reboot-ext4", "reboot-xfs", "reboot-btrfs"}
	for i, class := range []string{"disktemplate-ext4", "disktemplate-xfs", "disktemplate-btrfs"} {
		apply(t, claim(names[i], class, "512Mi"))
	}
	apply(t, inline("reboot-inline", "xfs", "size: 300Mi"))
	ready(t, append(names, "reboot-inline")...)
	if _, err := cluster("", "reboot"); err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		eventually(t, name, func() string {
			out, _ := cluster("", "kubectl", "exec", name, "--", "sh", "-c", "echo starts: $(grep -c UTC /data/starts)")
			return out
		}, "starts: 2")
	}
	// Kubelet starts the same pod again, with the inline volume that it had.
	eventually(t, "reboot-inline", func() string {
		out, _ := cluster("", "kubectl", "exec", "reboot-inline", "--", "cat", "/data/hello")
		return out
	}, "hello")
}

// TestForceDeleted deletes pods by force, while the plugin is away.
func TestForceDeleted(t *testing.T) {
	t.Cleanup(func() { freshSidecars(t); mustBeClean(t) })
	pods := inline("forced", "xfs", "size: 300Mi") + claim("forced-claim", "disktemplate-ext4", "64Mi")
	apply(t, pods)
	ready(t, "forced", "forced-claim")
	patch := func(selector string) {
		t.Helper()
		if _, err := cluster("", "kubectl", "patch", "daemonset", "-n", namespace, "plugin", "--patch", `{"spec": {"template": {"spec": {"nodeSelector": {"away": `+selector+`}}}}}`); err != nil {
			t.Error(err)
		}
	}
	back := func() { patch("null") }
	t.Cleanup(back)
	patch(`"yes"`)
	eventually(t, "the plugin's pods", func() string {
		return "left:" + kubectl(t, "get", "pod", "-n", namespace, "-l", "app.kubernetes.io/component=plugin", "-o", "name") + ":"
	}, "left::")
	kubectl(t, "delete", "pod", "forced", "forced-claim", "--force", "--grace-period=0")
	if left := residue(t); !strings.Contains(left, "kubernetes.io~csi") {
		t.Errorf("the volumes were gone before the plugin came back, so this tests nothing: %s", left)
	}
	back()
	pluginReady(t)
	remove(t, pods)
	mustBeClean(t)
}

// TestBadParameters reads the events that tell users of their mistakes.
func TestBadParameters(t *testing.T) {
	for name, c := range map[string]struct {
		parameters string
		says       []string
	}{
		"bad-name":  {"lable: x", []string{`"lable"`, "label"}},
		"bad-value": {"provisioning: fat", []string{`"fat"`, "provisioning", "thin", "thick"}},
		"bad-fs":    {"csi.storage.k8s.io/fstype: ntfs", []string{`"ntfs"`, "btrfs, ext4, xfs"}},
	} {
		t.Run(name, func(t *testing.T) {
			apply(t, fmt.Sprintf("apiVersion: storage.k8s.io/v1\nkind: StorageClass\nmetadata: {name: %s}\nprovisioner: csi.disktemplate.io\nvolumeBindingMode: WaitForFirstConsumer\nparameters: {%s}\n", name, c.parameters))
			apply(t, claim(name, name, "64Mi"))
			t.Log(eventually(t, "the events", func() string { return events(t, name) }, c.says...))
		})
	}
	t.Run("inline", func(t *testing.T) {
		apply(t, inline("bad-inline", "ext4", "sise: 64Mi"))
		t.Log(eventually(t, "the events", func() string { return events(t, "bad-inline") }, "FailedMount", `"sise"`, "size"))
	})
	mustBeClean(t)
}

// TestPreprovisionedSnapshot writes a VolumeSnapshotContent for an existing snapshot, as an administrator may, and makes a
// claim of it. Its label names the node that the snapshot is on.
func TestPreprovisionedSnapshot(t *testing.T) {
	t.Cleanup(func() { mustBeClean(t) })
	apply(t, claim("origin", "disktemplate-xfs", "300Mi"))
	ready(t, "origin")
	apply(t, `
apiVersion: snapshot.storage.k8s.io/v1
kind: VolumeSnapshot
metadata: {name: dynamic}
spec: {volumeSnapshotClassName: disktemplate, source: {persistentVolumeClaimName: origin}}
`)
	kubectl(t, "wait", "--for=jsonpath={.status.readyToUse}=true", "volumesnapshot/dynamic", "--timeout=60s")
	content := get(t, "volumesnapshot dynamic", ".status.boundVolumeSnapshotContentName")
	handle := get(t, "volumesnapshotcontent "+content, ".status.snapshotHandle")
	apply(t, fmt.Sprintf(`
apiVersion: snapshot.storage.k8s.io/v1
kind: VolumeSnapshotContent
metadata:
  name: written
  labels: {snapshot.storage.kubernetes.io/managed-by: node1}
spec:
  deletionPolicy: Retain
  driver: csi.disktemplate.io
  source: {snapshotHandle: %s}
  volumeSnapshotRef: {name: written, namespace: default}
---
apiVersion: snapshot.storage.k8s.io/v1
kind: VolumeSnapshot
metadata: {name: written}
spec: {source: {volumeSnapshotContentName: written}}
`, handle))
	kubectl(t, "wait", "--for=jsonpath={.status.readyToUse}=true", "volumesnapshot/written", "--timeout=60s")
	apply(t, strings.Replace(claim("of-written", "disktemplate-xfs", "300Mi"), "accessModes:", "dataSource: {apiGroup: snapshot.storage.k8s.io, kind: VolumeSnapshot, name: written}, accessModes:", 1))
	ready(t, "of-written")
	if starts := kubectl(t, "exec", "of-written", "--", "grep", "-c", "UTC", "/data/starts"); strings.TrimSpace(starts) != "2" {
		t.Errorf("the file has %s lines, expected one from before the snapshot and one from after it", strings.TrimSpace(starts))
	}
}

// TestSlowTemplate asks for disks without templates, so many at once that the last one waits long for its formatting VM.
// Kubelet waits two minutes for a call. So each pod starts when its disk is ready, and no event looks like a failure.
func TestSlowTemplate(t *testing.T) {
	t.Cleanup(func() { mustBeClean(t) })
	built := metric(t, "csi_disktemplate_template_build_duration_seconds_sum")
	var pods, manifests []string
	for i := range 6 {
		pods = append(pods, fmt.Sprint("slow-", i))
		manifests = append(manifests, inline(pods[i], "ext4", fmt.Sprintf("size: 100Gi, label: s%d-%d", time.Now().Unix(), i)))
	}
	start := time.Now()
	apply(t, strings.Join(manifests, "---\n"))
	ready(t, pods...)
	t.Logf("%d templates took %.1f s, in %s", len(pods), metric(t, "csi_disktemplate_template_build_duration_seconds_sum")-built, time.Since(start).Round(time.Second))
	for _, pod := range pods {
		if got := events(t, pod); strings.Contains(got, "Failed") {
			t.Errorf("the events of pod %s:\n%s", pod, got)
		}
	}
	// A VM would take minutes for this size: --max-inline-size refuses it.
	apply(t, inline("too-large-inline", "ext4", "size: 4Ti"))
	t.Log(eventually(t, "the events", func() string { return events(t, "too-large-inline") }, "FailedMount", "OutOfRange", "size", "--max-inline-size"))
}

// TestPrivileges reads in the audit log who asked the API server for what since the cluster started.
func TestPrivileges(t *testing.T) {
	apply(t, claim("audited", "disktemplate-xfs", "300Mi"))
	ready(t, "audited")
	b, err := os.ReadFile(filepath.Join(stateDir(), "logs/audit.log"))
	if err != nil {
		t.Fatal(err)
	}
	var sidecars int
	for line := range strings.Lines(string(b)) {
		var e struct {
			Verb, RequestURI string
			User             struct{ Username string }
			SourceIPs        []string
			Annotations      map[string]string
		}
		decode(t, line, &e)
		account, ours := strings.CutPrefix(e.User.Username, "system:serviceaccount:"+namespace+":")
		// The plugin has a pod's address and no service account.
		if !ours && slices.ContainsFunc(e.SourceIPs, func(ip string) bool { return strings.HasPrefix(ip, "172.31.254.") }) {
			t.Errorf("a pod without a service account asked to %s %s", e.Verb, e.RequestURI)
		}
		if ours {
			sidecars++
			if account != "claims" && account != "snapshots" {
				t.Errorf("%s asked to %s %s", account, e.Verb, e.RequestURI)
			}
			if e.Annotations["authorization.k8s.io/decision"] == "forbid" && !strings.Contains(e.RequestURI, "groupsnapshot") {
				t.Errorf("%s may not %s %s", e.User.Username, e.Verb, e.RequestURI)
			}
		}
	}
	if sidecars == 0 {
		t.Error("the audit log has no request of a sidecar, so this tests nothing")
	}
	if mounts := kubectl(t, "get", "pod", "-n", namespace, plugin(t), "-o", "jsonpath={.spec.containers[*].volumeMounts[*].mountPath}"); strings.Contains(mounts, "serviceaccount") {
		t.Errorf("the plugin has a token: %s", mounts)
	}
	for _, who := range []string{"claims", "snapshots"} {
		for _, what := range []string{"get secrets", "list secrets", "create pods", "delete nodes", "patch nodes", "get configmaps", "get daemonsets.apps"} {
			for _, where := range []string{"--all-namespaces", "--namespace=" + namespace} {
				args := append([]string{"kubectl", "auth", "can-i", where, "--as=system:serviceaccount:" + namespace + ":" + who}, strings.Fields(what)...)
				if out, _ := cluster("", args...); strings.TrimSpace(out) != "no" {
					t.Errorf("may %s %s, %s? %s", who, what, where, out)
				}
			}
		}
	}
}
