// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build e2e

package e2e

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// imageBytes is the length of the images that these tests import.
const imageBytes = 8 << 20

// image is one of these images: a line, again and again.
func image(line string) []byte {
	return bytes.Repeat([]byte(line+"\n"), imageBytes/len(line))[:imageBytes]
}

// withKubeVirtOverlay installs the overlay as it is written, and the component that the example content.yaml needs. Its
// pool is on a tmpfs: one of 100Gi does not become smaller again, and the machine may not have the space to promise. When
// the test ends, the old pool and the usual install are back.
func withKubeVirtOverlay(t *testing.T) {
	t.Helper()
	withKubeVirtCRDs(t)
	mustBeClean(t)
	const dir = "/var/lib/csi-disktemplate"
	t.Cleanup(func() { // whatever fails before
		if err := install(); err != nil {
			t.Error(err)
		}
		freshSidecars(t)
	})
	withoutPlugin(t, "mount", "-t", "tmpfs", "-o", "size=200G,mode=0700", "pool-for-vms", dir)
	t.Cleanup(func() {
		mustBeClean(t)
		kubectl(t, "delete", "--ignore-not-found", "storageclass", "disktemplate-vm", "disktemplate-vm-xfs", "disktemplate-vm-image")
		withoutPlugin(t, "umount", dir)
	})
	putContent(t, "debian.img", image("content"))
	listContents(t, "contents:\n- {name: debian, disk: debian.img, namespaces: [default]}\n")
	if _, err := cluster(kustomize(t, withComponents(t, "kubevirt", "contents")), "kubectl", "apply", "-f", "-"); err != nil {
		t.Fatal(err)
	}
	pluginReady(t)
	kubectl(t, "rollout", "restart", "-n", namespace, "daemonset/claims") // as freshSidecars does
	kubectl(t, "rollout", "status", "-n", namespace, "daemonset/claims", "--timeout="+patience.String())
}

// withoutPlugin takes the plugin away, waits until its pool has no device, and runs a command on the node.
func withoutPlugin(t *testing.T, args ...string) {
	t.Helper()
	kubectl(t, "delete", "--ignore-not-found", "daemonset", "-n", namespace, "plugin")
	eventually(t, "the pool", func() string {
		left, _ := poolLoops(t)
		return fmt.Sprint("devices: ", left)
	}, "devices: []")
	on(t, args...)
}

// TestKubeVirtExamples applies all examples for KubeVirt at once, as they are written, on their overlay, and does with them
// what CDI and KubeVirt do. All claims become Bound and hold what was written. Then it does the same with the overlay for
// one node, whose profiles have CDI clone the image by a snapshot.
func TestKubeVirtExamples(t *testing.T) {
	withKubeVirtOverlay(t)
	dir := filepath.Join(root, examples, "kubevirt")
	t.Cleanup(func() { kubectl(t, "delete", "--ignore-not-found", "--wait=false", "-f", dir) })
	kubectl(t, "apply", "--validate=strict", "-f", dir)
	vms := virtualMachines(t)
	for _, vm := range vms {
		apply(t, vm.launcher(t))
	}
	golden, cron := dataVolumes(t)["golden"], cronImport(t, "debian")
	of := templateOf(t, vms, "of-import-root")
	apply(t, golden.target()+golden.importer()+cron.target()+cron.importer()+of.target())
	golden.populated(t)
	lookAgain(t, "volumesnapshot/golden", "{.status.readyToUse}=true")
	lookAgain(t, "pvc/from-golden-root", "{.status.phase}=Bound")
	cron.populated(t)
	of.clone(t, cron)
	holds := map[string]string{"of-content": "content", "from-golden": "golden", "of-import": cron.name}
	for _, vm := range vms {
		log := vm.says(t)
		if from, ok := holds[vm.Metadata.Name]; ok {
			mustSay(t, log, begins("root", from))
		} else {
			mustSay(t, log, "scratch has 21474836480 bytes and begins with XFSB")
		}
	}

	mustNotExpand(t, "scratch-image")

	kubectl(t, "apply", "-k", filepath.Join(root, "deploy/kubernetes/overlays/kubevirt-one-node"), "-l", "app.kubernetes.io/component=kubevirt")
	again := of
	again.name = "of-snapshot"
	vm := virtualMachine{}
	vm.Metadata.Name = again.name
	vm.Spec.Template.Spec.Volumes = []vmVolume{{Name: "root", DataVolume: &vmDataVolume{Name: again.name}}}
	apply(t, again.target()+vm.launcher(t))
	again.clone(t, cron)
	mustSay(t, vm.says(t), begins("root", cron.name))
}

// mustNotExpand reads what the API server says of a claim whose class does not allow it to be expanded, as
// docs/kubevirt.md quotes it.
func mustNotExpand(t *testing.T, claim string) {
	t.Helper()
	const words = "storageclass that provisions the pvc must support resize"
	out, err := cluster("", "kubectl", "patch", "pvc", claim, "--patch", `{"spec": {"resources": {"requests": {"storage": "30Gi"}}}}`)
	if err == nil {
		t.Fatalf("%s was expanded: %s", claim, out)
	}
	mustSay(t, err.Error(), words)
	doc, err := os.ReadFile(filepath.Join(root, kubeVirtDoc))
	if err != nil {
		t.Fatal(err)
	}
	mustSay(t, string(doc), words)
}

// lookAgain waits for an object, whose controllers have backed off since it was applied. They look at once at what changes.
func lookAgain(t *testing.T, object, until string) {
	t.Helper()
	kubectl(t, "annotate", object, fmt.Sprint("test=", time.Now().UnixNano()))
	kubectl(t, "wait", "--for=jsonpath="+until, object, "--timeout="+patience.String())
}

// begins is what a VM says of a disk of 10Gi that was made of an image.
func begins(disk, line string) string {
	return fmt.Sprintf("%s has 10737418240 bytes and begins with the image %x", disk, sha256.Sum256(image(line)))
}

func mustSay(t *testing.T, log string, says ...string) {
	t.Helper()
	for _, s := range says {
		if !strings.Contains(log, s) {
			t.Errorf("there is no %q in\n%s", s, log)
		}
	}
}

// virtualMachine is what these tests read of a VirtualMachine.
type virtualMachine struct {
	Metadata struct{ Name string }
	Spec     struct {
		Template            struct{ Spec struct{ Volumes []vmVolume } }
		DataVolumeTemplates []dataVolumeObject
	}
}

type vmVolume struct {
	Name                  string
	PersistentVolumeClaim *struct{ ClaimName string }
	DataVolume            *vmDataVolume
}

type vmDataVolume struct{ Name string }

// virtualMachines are those that were applied.
func virtualMachines(t *testing.T) []virtualMachine {
	t.Helper()
	var list struct{ Items []virtualMachine }
	decode(t, kubectl(t, "get", "virtualmachines", "-o", "json"), &list)
	if len(list.Items) != 5 {
		t.Fatalf("expected 5 VMs: %v", list)
	}
	return list.Items
}

// templateOf is a DataVolume that a VM's dataVolumeTemplates ask for.
func templateOf(t *testing.T, vms []virtualMachine, name string) dataVolume {
	t.Helper()
	for _, vm := range vms {
		for _, o := range vm.Spec.DataVolumeTemplates {
			if o.Metadata.Name == name {
				return dataVolumeOf(t, name, o)
			}
		}
	}
	t.Fatalf("no VM has a DataVolume %s", name)
	return dataVolume{}
}

// launcher makes the manifest of a pod with the VM's disks. In place of a guest it has a shell that looks at each disk,
// and writes to it.
func (vm virtualMachine) launcher(t *testing.T) string {
	t.Helper()
	command := `look() {
  size=$(blockdev --getsize64 $2 2>/dev/null || stat -c %s $2)
  case $(head -c 4 $2) in
  XFSB) what=XFSB ;;
  *) what="the image $(head -c ` + fmt.Sprint(imageBytes) + ` $2 | sha256sum | cut -c-64)" ;;
  esac
  echo $1 has $size bytes and begins with $what
  printf "written to $1" | dd of=$2 bs=4096 seek=16384 conv=notrunc,sync,fsync 2>/dev/null
  dd if=$2 bs=4096 skip=16384 count=1 2>/dev/null | tr -d '\0'; echo
}
`
	var disks []podDisk
	for _, v := range vm.Spec.Template.Spec.Volumes {
		disk := podDisk{name: v.Name, mode: "Block"}
		switch {
		case v.PersistentVolumeClaim != nil:
			disk.claim = v.PersistentVolumeClaim.ClaimName
			disk.mode = get(t, "pvc "+disk.claim, ".spec.volumeMode")
		case v.DataVolume != nil:
			disk.claim = v.DataVolume.Name
		default:
			continue
		}
		disks = append(disks, disk)
		command += "look " + disk.name + " " + disk.path() + "\n"
	}
	return unprivileged("virt-launcher-"+vm.Metadata.Name, command+"echo done; sleep infinity", disks)
}

// says waits until a VM has looked at its disks.
func (vm virtualMachine) says(t *testing.T) string {
	t.Helper()
	log := eventually(t, "the log of "+vm.Metadata.Name, func() string {
		said, _ := cluster("", "kubectl", "logs", "virt-launcher-"+vm.Metadata.Name)
		return said
	}, "done")
	for _, v := range vm.Spec.Template.Spec.Volumes {
		if v.PersistentVolumeClaim != nil || v.DataVolume != nil {
			mustSay(t, log, "\nwritten to "+v.Name+"\n")
		}
	}
	return log
}
