// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build e2e

package e2e

import (
	"path/filepath"
	"strings"
	"testing"
)

// inClone types a command line in a clone of the repository on the node, where helm and kubectl are on PATH. Helm's
// caches stay in the cluster's directory.
func inClone(t testing.TB, line string) string {
	t.Helper()
	state := stateDir()
	env := "export PATH=" + filepath.Join(state, "bin") + ":$PATH"
	for _, of := range []string{"CACHE", "CONFIG", "DATA"} {
		env += " HELM_" + of + "_HOME=" + filepath.Join(state, "helm")
	}
	return on(t, "sh", "-c", "cd "+root+" && "+env+" && "+line)
}

// typed types a line of docs/installing.md that begins with a command, with more flags.
func typed(t testing.TB, command, flags string) string {
	t.Helper()
	return inClone(t, command+documented(t, "installing.md", command)+flags)
}

const (
	helmInstall   = "helm install csi-disktemplate "
	helmUpgrade   = "helm upgrade csi-disktemplate "
	helmTakeOver  = "helm install --take-ownership --server-side=false csi-disktemplate "
	helmUninstall = "helm uninstall csi-disktemplate "
)

// rolledOut waits until all DaemonSets run what was installed last.
func rolledOut(t testing.TB) {
	t.Helper()
	for _, name := range []string{"plugin", "claims", "snapshots"} {
		kubectl(t, "rollout", "status", "-n", namespace, "daemonset/"+name, "--timeout="+patience.String())
	}
}

// TestHelm walks the ways of docs/installing.md: Helm takes over what the manifests installed, upgrades it, uninstalls
// it, installs it on nothing, and gives it back. A claim and an inline volume live through all of it.
func TestHelm(t *testing.T) {
	t.Cleanup(func() { mustBeClean(t) })
	t.Cleanup(giveBack(t))
	pods := claim("helm-claim", "disktemplate-ext4", "64Mi") + inline("helm-inline", "xfs", "size: 300Mi")
	apply(t, pods)
	ready(t, "helm-claim", "helm-inline")
	lives := func(after string) {
		t.Helper()
		for pod, file := range map[string]string{"helm-claim": "/data/starts", "helm-inline": "/data/hello"} {
			if kubectl(t, "exec", pod, "--", "cat", file) == "" {
				t.Errorf("after %s, %s of %s is empty", after, file, pod)
			}
		}
	}
	const snapshots = " --set snapshots.enabled=true" // as in what was installed

	checkNotes(t, typed(t, helmTakeOver, snapshots))
	rolledOut(t)
	lives("taking over")

	typed(t, helmUpgrade, snapshots+" --set extraArgs={--max-inline-size=200Gi}")
	rolledOut(t)
	if args := pluginArgs(t); !strings.Contains(args, "--max-inline-size=200Gi") {
		t.Errorf("after the upgrade the plugin has %s", args)
	}
	lives("the upgrade")

	typed(t, helmUninstall, "")
	eventually(t, "the pods that are left", func() string {
		return "left: " + kubectl(t, "get", "pods", "-n", namespace, "-o", "name") + ":"
	}, "left: :")
	lives("uninstalling")

	typed(t, helmInstall, snapshots)
	rolledOut(t)
	if args := pluginArgs(t); strings.Contains(args, "--max-inline-size") {
		t.Errorf("installed anew, the plugin has %s", args)
	}
	lives("installing")
	remove(t, pods) // the new plugin takes away what the old one made
	mustBeClean(t)

	giveBack(t)()
	apply(t, claim("after-helm", "disktemplate-xfs", "300Mi"))
	ready(t, "after-helm")
}

// giveBack returns what applies the manifests over what Helm installed, and then has Helm uninstall what is still its
// own. It does nothing more once that is done.
func giveBack(t *testing.T) func() {
	return func() {
		if err := install(); err != nil {
			t.Error(err)
		}
		if inClone(t, "helm list --short --all-namespaces") != "" {
			typed(t, helmUninstall, "")
		}
		rolledOut(t)
	}
}

// checkNotes looks for what the user is to do next. The namespace has the label that the notes may ask for.
func checkNotes(t *testing.T, notes string) {
	t.Helper()
	for _, says := range []string{"in the namespace " + namespace, "csi.disktemplate.io/plugin=true"} {
		if !strings.Contains(notes, says) {
			t.Errorf("the notes do not say %q:\n%s", says, notes)
		}
	}
	if strings.Contains(notes, "pod-security") {
		t.Errorf("the notes ask for a label that the namespace has:\n%s", notes)
	}
}

// pluginArgs returns the arguments that the DaemonSet gives to the plugin.
func pluginArgs(t *testing.T) string {
	t.Helper()
	return kubectl(t, "get", "-n", namespace, "daemonset/plugin", "-o", "jsonpath={..containers[0].args}")
}

// TestHelmValues has the API server validate strictly what the chart renders with each switch, and with all of them.
func TestHelmValues(t *testing.T) {
	withKubeVirtCRDs(t)
	withCRDs(t, "monitoring-crds.yaml")
	all := ""
	for _, flags := range []string{
		"", "--set snapshots.enabled=true,kubevirt.enabled=true,kubevirt.oneNode=true", "--set prewarm.enabled=true,prewarm.templates={xfs:10Gi}",
		`--set contents.enabled=true --set-json 'contents.list=[{"name":"pg","tar":"pg.tar.zst","namespaces":["ci"]}]'`,
		"--set goldens.enabled=true", "--set monitors.enabled=true,monitors.labels.release=prometheus",
		"--set openshift.enabled=true", "--set nodes.chosenOnly=true",
		`--set-json 'claims.moreStorageClasses=[{"name":"big","parameters":{"format":"xfs"}}]'`,
	} {
		all += " " + flags
		validate(t, inClone(t, "helm template csi-disktemplate "+chart+" -n "+namespace+" "+flags))
	}
	manifest := inClone(t, "helm template csi-disktemplate "+chart+" -n "+namespace+" --set namespace.create=true"+all)
	validate(t, manifest)
	checkPlaces(t, objects(t, manifest))
}

const chart = "deploy/helm/csi-disktemplate"
