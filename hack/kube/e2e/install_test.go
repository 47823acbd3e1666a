// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build e2e

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestOverlays has the API server validate every overlay and KubeVirt example strictly.
func TestOverlays(t *testing.T) {
	// KubeVirt and CDI are not installed. Their objects are checked by schemas of the fields in use, written from their
	// documentation.
	crds, err := os.ReadFile("kubevirt-crds.yaml")
	if err != nil {
		t.Fatal(err)
	}
	apply(t, string(crds))
	kubectl(t, "wait", "--for=condition=Established", "crd", "--all", "--timeout=60s")
	overlays, err := filepath.Glob(filepath.Join(root, "deploy/kubernetes/overlays/*"))
	if err != nil || len(overlays) < 6 {
		t.Fatalf("overlays: %v, %v", overlays, err)
	}
	validate := func(args ...string) {
		t.Helper()
		if out, err := cluster("", append([]string{"kubectl", "apply", "--dry-run=server", "--validate=strict"}, args...)...); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
	}
	for _, overlay := range append(overlays, filepath.Join(root, "deploy/kubernetes")) {
		validate("-k", overlay)
	}
	validate("-f", filepath.Join(root, examples, "kubevirt"))
	// The check can fail.
	if out, err := cluster(strings.Replace(example(t, "kubevirt/block.yaml"), "domain:", "domian:", 1), "kubectl", "apply", "--dry-run=server", "--validate=strict", "-f", "-"); err == nil {
		t.Errorf("a VM with a misspelt field was accepted: %s", out)
	}
}

// TestUninstall deletes the manifests and looks at what the node still has: the pool's directory, and the empty directory
// of the socket.
func TestUninstall(t *testing.T) {
	manifests := filepath.Join(root, "deploy/kubernetes")
	apply(t, inline("before-uninstall", "xfs", "size: 300Mi"))
	ready(t, "before-uninstall")
	remove(t, inline("before-uninstall", "xfs", "size: 300Mi"))
	mustBeClean(t)
	kubectl(t, "delete", "-k", manifests, "--timeout="+patience.String())
	t.Cleanup(func() {
		if err := install(); err != nil {
			t.Error(err)
		}
	})
	found := eventually(t, "the list of what is left", func() string {
		// The node's mount table began as a copy of the machine's, so only the plugin's own places count.
		left := on(t, "sh", "-c", `
			find /var/lib/kubelet/plugins /var/lib/kubelet/plugins_registry -path '*csi.disktemplate.io*' ! -type d
			grep -E '^([^ ]+ ){4}/var/lib/(kubelet|csi-disktemplate)/' /proc/1/mountinfo | grep disktemplate | grep -v `+stateDir()+` | cut -d' ' -f5
			pgrep -f '^/usr/bin/csi-disktemplate' || true`)
		pool, volumes := poolLoops(t)
		for _, d := range append(pool, volumes...) {
			left += fmt.Sprintln(d)
		}
		return "left: " + left + ":"
	}, "left: :")
	t.Log(found)
	eventually(t, "the CSINode", func() string { return get(t, "csinode node1", ".spec.drivers") + ":" }, "null:")
	if kept := on(t, "ls", "/var/lib/csi-disktemplate"); !strings.Contains(kept, "pool.img") {
		t.Errorf("the pool is gone: %s", kept)
	}
}
