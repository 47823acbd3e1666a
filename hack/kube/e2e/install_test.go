// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build e2e

package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// object is what these tests read of the objects in a manifest.
type object struct {
	Kind     string
	Metadata struct {
		Name   string
		Labels map[string]string
	}
	Spec struct {
		// A DaemonSet's.
		Selector struct{ MatchLabels map[string]string }
		Template struct {
			Metadata struct{ Labels map[string]string }
			Spec     podSpec
		}
		// A NetworkPolicy's.
		PodSelector struct{ MatchLabels map[string]string }
		PolicyTypes []string
		Ingress     []struct {
			Ports []struct{ Port string }
			From  []any
		}
		Egress []any
	}
}

type podSpec struct {
	NodeSelector map[string]string
	Affinity     any
	Tolerations  any
	HostNetwork  bool
	Containers   []struct {
		Image string
		Args  []string
		Ports []struct {
			Name          string
			ContainerPort int
		}
	}
}

// kustomize returns the manifest that kubectl makes of a directory.
func kustomize(t testing.TB, dir string) string {
	t.Helper()
	return kubectl(t, "kustomize", dir)
}

// objects reads a manifest.
func objects(t testing.TB, manifest string) (all []object) {
	t.Helper()
	out, err := cluster(manifest, "kubectl", "create", "--dry-run=client", "--validate=false", "-o", "json", "-f", "-")
	if err != nil {
		t.Fatal(err)
	}
	for d := json.NewDecoder(strings.NewReader(out)); ; {
		var o struct {
			object
			Items []object
		}
		err := d.Decode(&o)
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatalf("%v in\n%s", err, out)
		}
		if all = append(all, o.Items...); o.Items == nil {
			all = append(all, o.object)
		}
	}
}

// validate has the API server validate a manifest strictly.
func validate(t testing.TB, manifest string) {
	t.Helper()
	if out, err := cluster(manifest, "kubectl", "apply", "--dry-run=server", "--validate=strict", "-f", "-"); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

// overlays returns the directories that users may apply.
func overlays(t testing.TB) []string {
	t.Helper()
	dirs, err := filepath.Glob(filepath.Join(root, "deploy/kubernetes/overlays/*"))
	if err != nil || len(dirs) < 8 {
		t.Fatalf("overlays: %v, %v", dirs, err)
	}
	return append(dirs, filepath.Join(root, "deploy/kubernetes"))
}

// withKubeVirtCRDs installs schemas of KubeVirt's and CDI's objects, which are not installed. TestKubeVirtSchemas says what
// they refuse.
func withKubeVirtCRDs(t testing.TB) { withCRDs(t, "kubevirt-crds.yaml") }

// withCRDs installs the schemas in a file.
func withCRDs(t testing.TB, file string) {
	t.Helper()
	crds, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	apply(t, string(crds))
	t.Cleanup(func() { remove(t, string(crds)) }) // the next test could not use those that are being deleted
	kubectl(t, "wait", "--for=condition=Established", "crd", "--all", "--timeout=60s")
}

// TestOverlays has the API server validate every overlay and KubeVirt example strictly, and looks at each object.
func TestOverlays(t *testing.T) {
	withKubeVirtCRDs(t)
	for _, dir := range overlays(t) {
		t.Run(filepath.Base(dir), func(t *testing.T) {
			manifest := kustomize(t, dir)
			validate(t, manifest)
			all := objects(t, manifest)
			checkLabels(t, all)
			checkPlaces(t, all)
			checkPolicies(t, all)
			snapshots := slices.ContainsFunc(all, func(o object) bool {
				return strings.HasPrefix(o.Kind, "VolumeSnapshot") || o.Metadata.Name == "snapshots"
			})
			if want := slices.Contains([]string{"snapshots", "kubevirt", "kubevirt-one-node"}, filepath.Base(dir)); snapshots != want {
				t.Errorf("needs the snapshot CRDs: %v, expected %v", snapshots, want)
			}
		})
	}
	kubevirt := filepath.Join(root, examples, "kubevirt")
	kubectl(t, "apply", "--dry-run=server", "--validate=strict", "-f", kubevirt)
}

// checkLabels expects the common labels on every object and pod, and the plugin's version where its image is.
func checkLabels(t *testing.T, all []object) {
	t.Helper()
	common := map[string]string{"name": "csi-disktemplate", "part-of": "csi-disktemplate", "managed-by": "kustomize", "component": `plugin|claims|snapshots|kubevirt`}
	check := func(of string, labels map[string]string) {
		t.Helper()
		for key, want := range common {
			if got := labels["app.kubernetes.io/"+key]; !regexp.MustCompile("^(?:" + want + ")$").MatchString(got) {
				t.Errorf("%s has the label app.kubernetes.io/%s=%q, expected %s", of, key, got, want)
			}
		}
	}
	for _, o := range all {
		of := o.Kind + " " + o.Metadata.Name
		check(of, o.Metadata.Labels)
		switch o.Kind {
		case "DaemonSet":
			labels := o.Spec.Template.Metadata.Labels
			check("the pod of "+of, labels)
			// A DaemonSet's selector can never be changed.
			if want := map[string]string{"app.kubernetes.io/name": "csi-disktemplate", "app.kubernetes.io/component": o.Metadata.Name}; !reflect.DeepEqual(o.Spec.Selector.MatchLabels, want) {
				t.Errorf("%s selects %v, expected %v", of, o.Spec.Selector.MatchLabels, want)
			}
			if o.Metadata.Name == "plugin" {
				_, tag, _ := strings.Cut(o.Spec.Template.Spec.Containers[0].Image, ":")
				for _, l := range []map[string]string{labels, o.Metadata.Labels} {
					if l["app.kubernetes.io/version"] != tag {
						t.Errorf("the image is %s, the label says %s", tag, l["app.kubernetes.io/version"])
					}
				}
			}
		case "CSIDriver":
			if got := o.Metadata.Labels["security.openshift.io/csi-ephemeral-volume-profile"]; got != "restricted" {
				t.Errorf("OpenShift takes inline volumes for %q", got)
			}
		case "Namespace":
			if got := o.Metadata.Labels["pod-security.kubernetes.io/enforce"]; got != "privileged" {
				t.Errorf("the namespace enforces %q", got)
			}
		}
	}
}

// checkPlaces expects that all DaemonSets run on the same nodes, for which there is an image. TestNodes knows which.
func checkPlaces(t *testing.T, all []object) {
	t.Helper()
	var first *podSpec
	for _, o := range all {
		if o.Kind != "DaemonSet" {
			continue
		}
		spec := o.Spec.Template.Spec
		if spec.NodeSelector["kubernetes.io/arch"] != "amd64" || spec.NodeSelector["kubernetes.io/os"] != "linux" {
			t.Errorf("%s runs on %v", o.Metadata.Name, spec.NodeSelector)
		}
		if first == nil {
			first = &spec
		}
		if !reflect.DeepEqual(spec.NodeSelector, first.NodeSelector) || !reflect.DeepEqual(spec.Affinity, first.Affinity) || !reflect.DeepEqual(spec.Tolerations, first.Tolerations) {
			t.Errorf("%s runs on other nodes than the rest: %+v", o.Metadata.Name, spec)
		}
	}
	if first == nil || first.Affinity == nil {
		t.Error("nothing says which nodes the plugin runs on")
	}
}

// checkPolicies expects that nothing can connect to the pods but to the plugin's port for metrics, and that the plugin
// listens there only. The cluster of these tests has a network that does not enforce policies.
func checkPolicies(t *testing.T, all []object) {
	t.Helper()
	find := func(kind, name string) object {
		i := slices.IndexFunc(all, func(o object) bool { return o.Kind == kind && o.Metadata.Name == name })
		if i < 0 {
			t.Fatalf("there is no %s %s", kind, name)
		}
		return all[i]
	}
	none, metrics, plugin := find("NetworkPolicy", "no-ingress").Spec, find("NetworkPolicy", "plugin").Spec, find("DaemonSet", "plugin").Spec
	if len(none.PodSelector.MatchLabels) != 0 || !slices.Equal(none.PolicyTypes, []string{"Ingress"}) || len(none.Ingress) != 0 {
		t.Errorf("no-ingress lets in: %+v", none)
	}
	if !reflect.DeepEqual(metrics.PodSelector.MatchLabels, plugin.Selector.MatchLabels) || !slices.Equal(metrics.PolicyTypes, []string{"Ingress", "Egress"}) || len(metrics.Egress) != 0 {
		t.Errorf("the plugin's policy is %+v", metrics)
	}
	container := plugin.Template.Spec.Containers[0]
	if len(metrics.Ingress) != 1 || len(metrics.Ingress[0].Ports) != 1 || metrics.Ingress[0].Ports[0].Port != container.Ports[0].Name || len(metrics.Ingress[0].From) == 0 {
		t.Errorf("the plugin's policy lets in %+v, its port is %+v", metrics.Ingress, container.Ports)
	}
	flags := []string{fmt.Sprintf("--http-endpoint=$(POD_IP):%d", container.Ports[0].ContainerPort), "--page-endpoint=127.0.0.1:9809"}
	for _, flag := range flags {
		if !slices.Contains(container.Args, flag) {
			t.Errorf("the plugin has no %s: %v", flag, container.Args)
		}
	}
	if len(container.Ports) != 1 || plugin.Template.Spec.HostNetwork {
		t.Errorf("the page may be reached: ports %+v, in the node's network: %v", container.Ports, plugin.Template.Spec.HostNetwork)
	}
}

// TestListensOnPodAddress looks at the plugin's sockets: one has the pod's address, and that of the page is on loopback.
func TestListensOnPodAddress(t *testing.T) {
	ip := net.ParseIP(kubectl(t, "get", "pod", "-n", namespace, plugin(t), "-o", "jsonpath={.status.podIP}")).To4()
	// proc_pid_net(5) has addresses and ports in hexadecimal, the address in the machine's order. 0A is TCP_LISTEN.
	want := []string{fmt.Sprintf("%02X%02X%02X%02X:%04X", ip[3], ip[2], ip[1], ip[0], 9808), fmt.Sprintf("0100007F:%04X", 9809)}
	slices.Sort(want)
	sockets := on(t, "sh", "-c", `pid=$(pgrep -f '^/usr/bin/csi-disktemplate --node-id' | head -1); awk '$4 == "0A" {print $2}' /proc/$pid/net/tcp /proc/$pid/net/tcp6`)
	if got := slices.Sorted(slices.Values(strings.Fields(sockets))); !slices.Equal(got, want) {
		t.Errorf("the plugin listens on %v, expected %v", got, want)
	}
}

// TestDocumented has the API server validate what docs/installing.md tells users to write.
func TestDocumented(t *testing.T) {
	withKubeVirtCRDs(t)
	doc, err := os.ReadFile(filepath.Join(root, "docs/installing.md"))
	if err != nil {
		t.Fatal(err)
	}
	kinds := map[string]int{}
	for _, block := range regexp.MustCompile("(?s)```yaml\n(.*?)```").FindAllStringSubmatch(string(doc), -1) {
		kind := regexp.MustCompile(`(?m)^kind: (\w+)`).FindStringSubmatch(block[1])
		if kind == nil {
			t.Errorf("not a manifest:\n%s", block[1])
			continue
		}
		kinds[kind[1]]++
		t.Run(fmt.Sprint(kind[1], " ", kinds[kind[1]]), func(t *testing.T) {
			if kind[1] != "Kustomization" {
				validate(t, block[1])
				return
			}
			// It is written in a directory beside the repository's.
			dir := t.TempDir()
			mine := filepath.Join(dir, "mine")
			if err := errors.Join(os.Symlink(root, filepath.Join(dir, "csi-disktemplate")), os.Mkdir(mine, 0o755),
				os.WriteFile(filepath.Join(mine, "kustomization.yaml"), []byte(block[1]), 0o644)); err != nil {
				t.Fatal(err)
			}
			manifest := kustomize(t, mine)
			validate(t, manifest)
			checkPlaces(t, objects(t, manifest))
			// Each has snapshots and says something of its own.
			if !strings.Contains(manifest, "csi-snapshotter") || !regexp.MustCompile(`path: (/var/mnt/csi-disktemplate|/var/lib/k0s/kubelet)\n`).MatchString(manifest) {
				t.Error(manifest)
			}
		})
	}
	if kinds["Kustomization"] < 2 || kinds["CSIStorageCapacity"] != 1 {
		t.Errorf("found %v", kinds)
	}
}

// withComponents returns a directory in which a user adds components to an overlay.
func withComponents(t testing.TB, overlay string, components ...string) string {
	t.Helper()
	dir := t.TempDir()
	mine := filepath.Join(dir, "mine")
	text := "resources: [../csi-disktemplate/deploy/kubernetes/overlays/" + overlay + "]\ncomponents:\n"
	for _, component := range components {
		text += "- ../csi-disktemplate/deploy/kubernetes/components/" + component + "\n"
	}
	if err := errors.Join(os.Symlink(root, filepath.Join(dir, "csi-disktemplate")), os.Mkdir(mine, 0o755),
		os.WriteFile(filepath.Join(mine, "kustomization.yaml"), []byte(text), 0o644)); err != nil {
		t.Fatal(err)
	}
	return mine
}

// TestComponents adds every component to the install that it is for, and looks at what changes.
func TestComponents(t *testing.T) {
	withCRDs(t, "monitoring-crds.yaml")
	for name, c := range map[string]struct {
		overlay string
		more    []string // components before it
		patches map[string]string
	}{
		"chosen-nodes": {"loopback", []string{"snapshots"}, map[string]string{"plugin": "csi.disktemplate.io/plugin: \"true\"", "claims": "csi.disktemplate.io/plugin: \"true\"", "snapshots": "csi.disktemplate.io/plugin: \"true\""}},
		"selinux":      {"directory", []string{"snapshots"}, map[string]string{"claims": "type: spc_t", "snapshots": "type: spc_t"}},
		"snapshots":    {"directory", nil, map[string]string{"snapshots": "csi-snapshotter"}},
		"k0s":          {"k0s", []string{"snapshots"}, map[string]string{"plugin": "/var/lib/k0s/kubelet", "claims": "/var/lib/k0s/kubelet/plugins/", "snapshots": "/var/lib/k0s/kubelet/plugins/"}},
		"microk8s":     {"microk8s", []string{"snapshots"}, map[string]string{"plugin": "/var/snap/microk8s/", "claims": "/var/snap/microk8s/", "snapshots": "/var/snap/microk8s/"}},
		"claims":       {"inline", nil, map[string]string{"claims": "csi-provisioner"}},
		"loopback":     {"../base", nil, map[string]string{"plugin": "--loopback-pool-size=20Gi"}},
		"prewarm":      {"loopback", nil, map[string]string{"plugin": "--prewarm-file=/etc/csi-disktemplate/templates"}},
		"contents":     {"loopback", []string{"prewarm"}, map[string]string{"plugin": "--contents=/etc/csi-disktemplate-contents/contents.yaml"}},
		"goldens":      {"loopback", []string{"contents"}, map[string]string{"plugin": "--shared-goldens=/etc/csi-disktemplate-goldens/goldens.yaml"}},
		"monitors":     {"loopback", nil, map[string]string{}},
		"vm-pool":      {"loopback", nil, map[string]string{"plugin": "--overcommit=4"}},
		"openshift":    {"loopback", []string{"selinux"}, map[string]string{"claims": "type: spc_t"}},
	} {
		t.Run(name, func(t *testing.T) {
			manifest := kustomize(t, withComponents(t, c.overlay, append(c.more, name)...))
			validate(t, manifest)
			all := objects(t, manifest)
			checkLabels(t, all)
			checkPlaces(t, all)
			var patched int
			for _, part := range strings.Split(manifest, "\n---\n") {
				name := regexp.MustCompile(`(?m)^  name: (\w+)`).FindStringSubmatch(part)
				if !strings.Contains(part, "kind: DaemonSet") {
					continue
				}
				if says := c.patches[name[1]]; says != "" {
					if patched++; !strings.Contains(part, says) {
						t.Errorf("the DaemonSet %s has no %s:\n%s", name[1], says, part)
					}
				}
			}
			if patched != len(c.patches) {
				t.Errorf("%d DaemonSets of %v are there", patched, c.patches)
			}
		})
	}
	found, err := filepath.Glob(filepath.Join(root, "deploy/kubernetes/components/*"))
	if err != nil || len(found) != 13 {
		t.Errorf("expected 13 components, found %v: %v", found, err)
	}
}

// TestPrewarm adds the component that reads a ConfigMap, then the ConfigMap, and then changes it. Nobody asks for the
// templates, and the plugin is not restarted.
func TestPrewarm(t *testing.T) {
	t.Cleanup(func() {
		if err := install(); err != nil {
			t.Error(err)
		}
		freshSidecars(t)
	})
	if _, err := cluster(kustomize(t, withComponents(t, "snapshots", "prewarm")), "kubectl", "apply", "-f", "-"); err != nil {
		t.Fatal(err)
	}
	pluginReady(t)
	pod := plugin(t)
	readyz := func() string { return pluginPage(t, "readyz") }
	eventually(t, "/readyz", readyz, "degraded: PrewarmFailed", "/etc/csi-disktemplate/templates: no such file")
	templates := func() string {
		return kubectl(t, "exec", "-n", namespace, pod, "-c", "plugin", "--", "csi-disktemplate", "clean-all", "--dry-run")
	}
	list := func(lines string) {
		t.Helper()
		apply(t, fmt.Sprintf(`
apiVersion: v1
kind: ConfigMap
metadata: {name: prewarm, namespace: %s}
data: {templates: %q}
`, namespace, lines))
	}
	list("ext4:71Mi # first\nxfs:10GB\next4:72Mi:label=data\n")
	eventually(t, "the templates", templates, "ext4-71m-", "ext4-72m-")
	eventually(t, "/readyz", readyz, "degraded: PrewarmFailed", "line 2 of /etc/csi-disktemplate/templates", "did you mean 10G ")
	list("ext4:73Mi\n")
	eventually(t, "the templates", templates, "ext4-73m-")
	if page := readyz(); strings.Contains(page, "PrewarmFailed") || !strings.HasPrefix(page, "ok\n") {
		t.Errorf("/readyz says %s", page)
	}
	if plugin(t) != pod {
		t.Error("the plugin was restarted")
	}
}

// TestNodes makes nodes of all kinds, and finds those on which the DaemonSets would run. No kubelet serves these nodes.
func TestNodes(t *testing.T) {
	const chosen, controlPlane = "csi.disktemplate.io/plugin", "node-role.kubernetes.io/control-plane"
	type labels = map[string]string
	nodes := map[string]struct {
		labels labels
		taint  string // KEY:EFFECT
		want   bool
	}{
		"worker":                {want: true},
		"worker-never":          {labels: labels{chosen: "false"}},
		"worker-gpu":            {taint: "nvidia.com/gpu:NoSchedule", want: true},
		"worker-maintained":     {taint: "maintenance:NoExecute", want: true},
		"arm":                   {labels: labels{"kubernetes.io/arch": "arm64"}},
		"arm-chosen":            {labels: labels{"kubernetes.io/arch": "arm64", chosen: "true"}},
		"windows":               {labels: labels{"kubernetes.io/os": "windows"}},
		"control-plane":         {labels: labels{controlPlane: ""}, taint: controlPlane + ":NoSchedule"},
		"control-plane-k3s":     {labels: labels{controlPlane: "true"}, taint: "CriticalAddonsOnly:NoExecute"},
		"control-plane-only":    {labels: labels{controlPlane: "true"}},
		"control-plane-chosen":  {labels: labels{controlPlane: "", chosen: "true"}, taint: controlPlane + ":NoSchedule", want: true},
		"control-plane-refused": {labels: labels{controlPlane: "", chosen: "false"}},
		"virtual":               {labels: labels{"type": "virtual-kubelet"}, taint: "virtual-kubelet.io/provider:NoSchedule"},
		"fargate":               {labels: labels{"eks.amazonaws.com/compute-type": "fargate"}, taint: "eks.amazonaws.com/compute-type:NoSchedule"},
	}
	run := func(want []string) {
		t.Helper()
		want = slices.Sorted(slices.Values(want))
		for _, set := range []string{"plugin", "claims", "snapshots"} {
			eventually(t, "the nodes of "+set, func() string {
				// The controller looks at pods that were never bound only when their DaemonSet changes.
				kubectl(t, "annotate", "daemonset", "-n", namespace, set, "--overwrite", fmt.Sprint("test=", time.Now().UnixNano()))
				return strings.Join(placed(t, set), " ") + ":"
			}, strings.Join(want, " ")+":")
		}
	}
	t.Cleanup(func() {
		run([]string{"node1"})
		kubectl(t, "annotate", "daemonset", "-n", namespace, "--all", "test-")
	})
	var manifest string
	want := []string{"node1"}
	for name, n := range nodes {
		manifest += fakeNode(t, name, n.labels, n.taint)
		if n.want {
			want = append(want, name)
		}
	}
	apply(t, manifest)
	run(want)
	time.Sleep(2 * time.Second) // the controller places a pod within milliseconds
	run(want)

	// A label takes effect at once.
	kubectl(t, "label", "node", "control-plane-only", chosen+"=true")
	run(append(want, "control-plane-only"))
	kubectl(t, "label", "node", "worker", chosen+"=false")
	run(append(slices.DeleteFunc(want, func(n string) bool { return n == "worker" }), "control-plane-only"))
}

// fakeNode makes the manifest of a node that no kubelet serves.
func fakeNode(t testing.TB, name string, labels map[string]string, taint string) string {
	t.Helper()
	all := map[string]string{"kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64", "kubernetes.io/hostname": name}
	maps.Copy(all, labels)
	spec := map[string]any{}
	if key, effect, ok := strings.Cut(taint, ":"); ok {
		spec["taints"] = []any{map[string]string{"key": key, "effect": effect}}
	}
	b, err := json.Marshal(map[string]any{"apiVersion": "v1", "kind": "Node", "metadata": map[string]any{"name": name, "labels": all}, "spec": spec})
	if err != nil {
		t.Fatal(err)
	}
	return string(b) + "\n---\n"
}

// placed returns the nodes that a DaemonSet has pods for, in order. The pods of nodes without a kubelet need not be bound.
func placed(t testing.TB, component string) []string {
	t.Helper()
	nodes := strings.Fields(kubectl(t, "get", "pods", "-n", namespace, "-l", "app.kubernetes.io/component="+component, "-o",
		`jsonpath={range .items[*]}{.spec.affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms[0].matchFields[0].values[0]}{"\n"}{end}`))
	slices.Sort(nodes)
	return nodes
}

// sidecar returns the name and the UID of the pod that a DaemonSet has bound to a node.
func sidecar(t testing.TB, component, node string) (name, uid string) {
	t.Helper()
	got := strings.Fields(eventually(t, "the pod of "+component+" on "+node, func() string {
		return kubectl(t, "get", "pods", "-n", namespace, "-l", "app.kubernetes.io/component="+component, "--field-selector=spec.nodeName="+node, "-o",
			`jsonpath={range .items[*]}{.metadata.name} {.metadata.uid}{"\n"}{end}`)
	}, component+"-"))
	return got[0], got[1]
}

// owners returns the capacity objects of a node with their owners, one a line.
func owners(t testing.TB, node string) string {
	t.Helper()
	return kubectl(t, "get", "csistoragecapacities", "-n", namespace, "-l", "csi.storage.k8s.io/managed-by=external-provisioner-"+node, "-o",
		`jsonpath={range .items[*]}{.storageClassName}: {.metadata.ownerReferences[*].kind} {.metadata.ownerReferences[*].name}, {.capacity}{"\n"}{end}`)
}

// TestCapacityOwner replaces the sidecars' pod, as an update does: the capacity objects of the old pod go, and the new pod
// writes them anew.
func TestCapacityOwner(t *testing.T) {
	classes := []string{"disktemplate-btrfs", "disktemplate-ext4", "disktemplate-xfs"}
	owned := func(pod string) {
		t.Helper()
		var lines []string
		for _, class := range classes {
			lines = append(lines, class+": Pod "+pod+", ")
		}
		t.Log(eventually(t, "the capacity objects", func() string { return owners(t, "node1") }, lines...))
	}
	old, _ := sidecar(t, "claims", "node1")
	owned(old)
	kubectl(t, "delete", "pod", "-n", namespace, old)
	kubectl(t, "rollout", "status", "-n", namespace, "daemonset/claims", "--timeout="+patience.String())
	next, _ := sidecar(t, "claims", "node1")
	start := time.Now()
	owned(next)
	t.Logf("written anew %s after the new pod was ready", time.Since(start).Round(100*time.Millisecond))
	if got := owners(t, "node1"); strings.Contains(got, old) || strings.Count(got, "\n") != len(classes) {
		t.Errorf("the old pod has left capacity objects:\n%s", got)
	}
}

// TestRemovedNode removes a node. What Kubernetes knows of its capacity goes with it, and docs/installing.md says how the
// claims that were there are removed. No kubelet serves the node, so its objects are written here as the sidecars write
// those of node1.
func TestRemovedNode(t *testing.T) {
	const node = "removed"
	t.Cleanup(func() {
		for _, set := range []string{"plugin", "claims", "snapshots"} {
			eventually(t, "the nodes of "+set, func() string { return strings.Join(placed(t, set), " ") + ":" }, "node1:")
		}
	})
	apply(t, fakeNode(t, node, map[string]string{"topology.csi.disktemplate.io/node": node}, ""))
	kubectl(t, "patch", "node", node, "--subresource=status", "--patch", `{"status": {"capacity": {"cpu": "4", "memory": "8Gi", "pods": "110"}, "allocatable": {"cpu": "4", "memory": "8Gi", "pods": "110"}}}`)
	sidecar(t, "plugin", node)
	sidecar(t, "snapshots", node)
	name, uid := sidecar(t, "claims", node)

	var real struct{ Items []map[string]any }
	decode(t, kubectl(t, "get", "csistoragecapacities", "-n", namespace, "-l", "csi.storage.k8s.io/managed-by=external-provisioner-node1", "-o", "json"), &real)
	if len(real.Items) == 0 {
		t.Fatal("node1 has no capacity objects")
	}
	capacity := real.Items[0]
	owner := capacity["metadata"].(map[string]any)["ownerReferences"].([]any)[0].(map[string]any)
	if owner["kind"] == "Pod" {
		owner["name"], owner["uid"] = name, uid
	}
	capacity["metadata"] = map[string]any{"name": "of-removed", "namespace": namespace, "ownerReferences": []any{owner},
		"labels": map[string]string{"csi.storage.k8s.io/drivername": "csi.disktemplate.io", "csi.storage.k8s.io/managed-by": "external-provisioner-" + node}}
	capacity["nodeTopology"] = map[string]any{"matchLabels": map[string]string{"topology.csi.disktemplate.io/node": node}}
	b, err := json.Marshal(capacity)
	if err != nil {
		t.Fatal(err)
	}
	apply(t, string(b)+fmt.Sprintf(`
---
apiVersion: v1
kind: PersistentVolume
metadata:
  name: of-removed
  annotations: {pv.kubernetes.io/provisioned-by: csi.disktemplate.io}
  finalizers: [external-provisioner.volume.kubernetes.io/finalizer]
spec:
  accessModes: [ReadWriteOnce]
  capacity: {storage: 64Mi}
  storageClassName: disktemplate-xfs
  persistentVolumeReclaimPolicy: Delete
  claimRef: {namespace: default, name: of-removed}
  csi: {driver: csi.disktemplate.io, volumeHandle: pvc-of-removed, fsType: xfs}
  nodeAffinity: {required: {nodeSelectorTerms: [{matchExpressions: [{key: topology.csi.disktemplate.io/node, operator: In, values: [%[1]s]}]}]}}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: of-removed}
spec: {storageClassName: disktemplate-xfs, volumeName: of-removed, accessModes: [ReadWriteOnce], resources: {requests: {storage: 64Mi}}}
---
apiVersion: snapshot.storage.k8s.io/v1
kind: VolumeSnapshotContent
metadata:
  name: of-removed
  labels: {snapshot.storage.kubernetes.io/managed-by: %[1]s}
spec:
  deletionPolicy: Delete
  driver: csi.disktemplate.io
  source: {snapshotHandle: snapshot-of-removed}
  volumeSnapshotRef: {name: of-removed, namespace: default}
---
apiVersion: snapshot.storage.k8s.io/v1
kind: VolumeSnapshot
metadata: {name: of-removed}
spec: {source: {volumeSnapshotContentName: of-removed}}
---
`, node)+pod("of-removed", "sleep infinity", "persistentVolumeClaim: {claimName: of-removed}"))
	eventually(t, "the claim", func() string { return get(t, "pvc of-removed", ".status.phase") }, "Bound")
	kubectl(t, "patch", "volumesnapshotcontent", "of-removed", "--subresource=status", "--type=merge", "--patch", `{"status": {"readyToUse": true, "restoreSize": 67108864, "snapshotHandle": "snapshot-of-removed", "creationTime": 1}}`)
	kubectl(t, "wait", "--for=jsonpath={.status.readyToUse}=true", "volumesnapshot/of-removed", "--timeout=60s")

	kubectl(t, "delete", "node", node)
	eventually(t, "the capacity of the removed node", func() string { return "left: " + owners(t, node) + ":" }, "left: :")
	eventually(t, "the pods of the removed node", func() string {
		return "left: " + kubectl(t, "get", "pods", "-A", "--field-selector=spec.nodeName="+node, "-o", "name") + ":"
	}, "left: :")
	if list := documented(t, "installing.md", "kubectl get pv -o "); !strings.Contains(kubectl(t, "get", "pv", "-o", strings.Trim(list, "'")), "of-removed default/of-removed "+node+"\n") {
		t.Errorf("the documented list of volumes is %s", kubectl(t, "get", "pv", "-o", strings.Trim(list, "'")))
	}
	kubectl(t, "delete", "pvc", "of-removed", "--timeout=60s")
	eventually(t, "the volume", func() string { return get(t, "pv of-removed", ".status.phase") }, "Released")
	kubectl(t, "delete", "pv", "of-removed", "--wait=false")
	time.Sleep(2 * time.Second)
	if got := get(t, "pv of-removed", ".metadata.finalizers"); !strings.Contains(got, "external-provisioner") {
		t.Errorf("the volume has the finalizers %s, so this tests nothing", got)
	}
	kubectl(t, "patch", "pv", "of-removed", "--type=merge", "--patch", `{"metadata": {"finalizers": null}}`)
	kubectl(t, "delete", "volumesnapshot", "of-removed", "--wait=false")
	time.Sleep(2 * time.Second)
	if got := get(t, "volumesnapshotcontent of-removed", ".metadata.finalizers"); !strings.Contains(got, "snapshot.storage.kubernetes.io") {
		t.Errorf("the snapshot's content has the finalizers %s, so this tests nothing", got)
	}
	kubectl(t, "patch", "volumesnapshotcontent", "of-removed", "--type=merge", "--patch", `{"metadata": {"finalizers": null}}`)
	eventually(t, "the list of what is left", func() string {
		return "left: " + kubectl(t, "get", "pv,volumesnapshots,volumesnapshotcontents", "--ignore-not-found", "-o", "name") + ":"
	}, "left: :")
}

// documented returns the rest of a document's line that begins with a command. A quoted word may go on in the next line,
// as a shell reads it.
func documented(t testing.TB, doc, command string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, "docs", doc))
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(command) + `((?:.*\\\n)*.*)$`).FindSubmatch(text)
	if m == nil {
		t.Fatalf("docs/%s has no line that begins with %q", doc, command)
	}
	return strings.ReplaceAll(string(m[1]), "'\\\n'", "")
}

// TestWithoutSnapshotCRDs installs the plugin as README says, where nobody has installed the snapshot CRDs.
func TestWithoutSnapshotCRDs(t *testing.T) {
	crds := filepath.Join(stateDir(), "bin/crds")
	t.Cleanup(func() {
		mustBeClean(t)
		kubectl(t, "apply", "-f", crds)
		kubectl(t, "wait", "--for=condition=Established", "-f", crds, "--timeout=60s")
		on(t, "sh", "-c", "kill $(cat "+filepath.Join(stateDir(), "pids/snapshot-controller")+")") // the node starts it again
		if err := install(); err != nil {
			t.Error(err)
		}
	})
	kubectl(t, "delete", "-k", filepath.Join(root, manifests), "--timeout="+patience.String())
	kubectl(t, "delete", "-f", crds, "--timeout="+patience.String())

	if out, err := cluster("", "kubectl", "apply", "-k", filepath.Join(root, manifests), "--dry-run=server"); err == nil {
		t.Errorf("there are snapshot CRDs, so this tests nothing: %s", out)
	}
	kubectl(t, "apply", "--validate=strict", "-k", filepath.Join(root, "deploy/kubernetes"))
	for _, set := range []string{"plugin", "claims"} {
		kubectl(t, "rollout", "status", "-n", namespace, "daemonset/"+set, "--timeout="+patience.String())
	}
	volumes := example(t, "inline.yaml") + "\n---\n" + example(t, "claim.yaml")
	apply(t, volumes)
	ready(t, "inline", "claim")
	remove(t, volumes)
	restarts := kubectl(t, "get", "pods", "-n", namespace, "-l", "app.kubernetes.io/component=claims", "-o", "jsonpath={.items[*].status.containerStatuses[*].restartCount}")
	if restarts != "0 0" {
		t.Errorf("the sidecars were restarted: %s", restarts)
	}
}

// TestUninstall deletes the manifests and looks at what the node still has: the pool's directory, and the empty directory
// of the socket.
func TestUninstall(t *testing.T) {
	apply(t, inline("before-uninstall", "xfs", "size: 300Mi"))
	ready(t, "before-uninstall")
	remove(t, inline("before-uninstall", "xfs", "size: 300Mi"))
	mustBeClean(t)
	kubectl(t, "delete", "-k", filepath.Join(root, manifests), "--timeout="+patience.String())
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
