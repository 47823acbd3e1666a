// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build e2e

package e2e

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// disktemplate runs kubectl disktemplate on the node, where kubectl finds it on PATH.
func disktemplate(args ...string) (string, error) {
	path := "PATH=" + filepath.Join(stateDir(), "bin") + ":" + filepath.Join(root, "bin") + ":" + os.Getenv("PATH")
	return cluster("", append([]string{"run", "env", path, "kubectl", "disktemplate"}, args...)...)
}

// why is what kubectl disktemplate says that pods wait for: a line for each of their volumes, with its cause first.
func why(t testing.TB, pods ...string) string {
	t.Helper()
	var said strings.Builder
	for _, pod := range pods {
		out, err := disktemplate("why", pod, "-o", "json")
		if err != nil {
			fmt.Fprintln(&said, err) // the plugin may be busy
			continue
		}
		var w struct {
			Scheduler string
			Claims    []struct{ Name, Phase, Node string }
			Nodes     []struct {
				Node  string
				Waits []struct{ Cause, Text, Remedy string }
			}
		}
		decode(t, out, &w)
		fmt.Fprintf(&said, "%s: scheduler: %s; claims: %v\n", pod, w.Scheduler, w.Claims)
		for _, n := range w.Nodes {
			for _, wait := range n.Waits {
				fmt.Fprintf(&said, "cause %s on %s: %s: %s\n", wait.Cause, n.Node, wait.Text, wait.Remedy)
			}
		}
	}
	return said.String()
}

// waits waits until a pod is said to wait for the true reason.
func waits(t testing.TB, pod string, says ...string) {
	t.Helper()
	t.Log(eventually(t, "kubectl disktemplate why "+pod, func() string { return why(t, pod) }, says...))
}

// TestKubectlWhy has pods wait for each reason in turn.
func TestKubectlWhy(t *testing.T) {
	t.Cleanup(func() { mustBeClean(t) })
	t.Run("refused", func(t *testing.T) {
		apply(t, inline("why-refused", "ext4", "sise: 64Mi"))
		waits(t, "why-refused", "cause request on node1", `"sise"`, "correct the volume in the pod's spec")
		out, err := disktemplate("why", "why-refused", "-n", "default")
		if err != nil || !strings.Contains(out, "default/why-refused is on node node1.") || !strings.Contains(out, `"sise"`) {
			t.Errorf("%v: %s", err, out)
		}
	})
	t.Run("refused claim", func(t *testing.T) {
		apply(t, "apiVersion: storage.k8s.io/v1\nkind: StorageClass\nmetadata: {name: why-fat}\nprovisioner: csi.disktemplate.io\n"+
			"volumeBindingMode: WaitForFirstConsumer\nparameters: {provisioning: fat}\n")
		apply(t, claim("why-fat", "why-fat", "64Mi"))
		waits(t, "why-fat", "{why-fat Pending node1}", "cause request on node1", `provisioning "fat"`)
	})
	t.Run("template", func(t *testing.T) {
		var pods, manifests []string
		for i := range 6 { // so many that one can be asked for while its template is built
			pods = append(pods, fmt.Sprint("why-slow-", i))
			manifests = append(manifests, inline(pods[i], "xfs", fmt.Sprintf("size: 9Gi, label: w%d-%d", time.Now().Unix()%1e6, i)))
		}
		apply(t, strings.Join(manifests, "---\n"))
		t.Log(eventually(t, "kubectl disktemplate why", func() string { return why(t, pods...) }, "cause template on node1", "is being built"))
		ready(t, pods...)
		if said := why(t, pods...); strings.Contains(said, "cause") {
			t.Errorf("all pods run:\n%s", said)
		}
	})
	t.Run("elsewhere", func(t *testing.T) {
		apply(t, pod("why-plain", "sleep infinity", "emptyDir: {}"))
		ready(t, "why-plain")
		if out, err := disktemplate("why", "why-plain"); err != nil || !strings.Contains(out, "has no volume of this driver") {
			t.Errorf("%v: %s", err, out)
		}
		if _, err := disktemplate("why", "why-nobody"); err == nil || !strings.Contains(err.Error(), "kubectl get pods -A shows") {
			t.Error(err)
		}
	})
}

// TestKubectlWhyNoSpace fills the pool, for a claim that the scheduler places nowhere, and for an inline volume.
func TestKubectlWhyNoSpace(t *testing.T) {
	t.Cleanup(func() { mustBeClean(t) })
	apply(t, claim("why-too-large", "disktemplate-ext4", "30Gi"))
	waits(t, "why-too-large", "did not have enough free storage", "{why-too-large Pending }")
	apply(t, "apiVersion: storage.k8s.io/v1\nkind: StorageClass\nmetadata: {name: why-thick}\nprovisioner: csi.disktemplate.io\n"+
		"volumeBindingMode: WaitForFirstConsumer\nparameters: {provisioning: thick}\n")
	apply(t, claim("why-hog", "why-thick", strconv.FormatInt(emptyCapacity(t, "why-thick")>>20-256, 10)+"Mi"))
	filler := inline("why-filler", "xfs", "size: 1Gi")
	apply(t, filler)
	ready(t, "why-hog", "why-filler")
	kubectl(t, "exec", "why-filler", "--", "dd", "if=/dev/zero", "of=/data/f", "bs=1M", "count=400", "conv=fsync")
	apply(t, inline("why-no-room", "ext4", "size: 64Mi"))
	waits(t, "why-no-room", "cause space on node1", "pool is full", "make room in the pool")
	remove(t, filler)
	ready(t, "why-no-room")
}

// TestKubectlDisktemplate asks for the nodes, and gathers a report.
func TestKubectlDisktemplate(t *testing.T) {
	out, err := disktemplate("status")
	if err != nil || !strings.Contains(out, "node1") || !strings.Contains(out, plugin(t)) || strings.Contains(out, "no answer") {
		t.Errorf("%v: %s", err, out)
	}
	// Without KVM doctor exits with 1, and 0 with it.
	if out, err := disktemplate("doctor", "--node", "node1"); !strings.Contains(out, "good      pool:") || strings.Contains(out, "could not look") {
		t.Errorf("%v: %s", err, out)
	}
	report := filepath.Join(t.TempDir(), "report.tar.gz")
	if out, err := disktemplate("bundle", "-o", report); err != nil || strings.Contains(out, "It lacks") {
		t.Fatalf("%v: %s", err, out)
	}
	list, err := exec.Command("tar", "-tzf", report).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, list)
	}
	for _, name := range []string{
		"report/README.txt", "report/versions.json", "report/nodes/node1/" + plugin(t) + "/doctor.json", "/volumes.json",
		"report/logs/" + namespace + "/" + plugin(t) + "/plugin.log", "csi-provisioner.log", "csidriver-described.txt", "csinodes-described.txt",
		"events-" + namespace + ".txt",
	} {
		if !strings.Contains(string(list), name) {
			t.Errorf("the report lacks %s:\n%s", name, list)
		}
	}
}

// TestPage reads the page as its operator does, through a port that kubectl forwards.
func TestPage(t *testing.T) {
	forward := "kubectl -n csi-disktemplate port-forward "
	command := forward + strings.Replace(documented(t, "operating.md", forward), "POD", plugin(t), 1)
	get := func(path string) string {
		return on(t, "bash", "-c", "PATH=$STATE/bin:$PATH; "+command+` >/dev/null & trap "kill $!" EXIT
for _ in {1..100}; do wget -qO- -T 5 -t 1 http://127.0.0.1:9809`+path+` && exit; sleep 0.1; done; exit 1`)
	}
	if page := get("/"); !strings.Contains(page, "<title>csi-disktemplate</title>") {
		t.Errorf("the page is %.200q", page)
	}
	if status := get("/v1/status"); !strings.Contains(status, `"node":"node1"`) {
		t.Errorf("the status is %.200q", status)
	}
	ip := kubectl(t, "get", "pod", "-n", namespace, plugin(t), "-o", "jsonpath={.status.podIP}")
	if out, err := cluster("", "run", "wget", "-qO-", "-T", "3", "-t", "1", "http://"+net.JoinHostPort(ip, "9809")+"/"); err == nil {
		t.Errorf("other pods reach the page: %.200q", out)
	}
}
