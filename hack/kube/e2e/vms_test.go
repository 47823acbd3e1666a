// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build e2e

package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"testing"
	"time"
)

const (
	vmsDoc  = "docs/kubevirt.md" // whose how-to TestVMs types
	manyVMs = 20
)

// TestVMs types the how-to that goes from nothing to twenty VMs of one containerDisk. Then it does to VMs that run what
// KubeVirt does to them.
func TestVMs(t *testing.T) {
	h := newVMs(t)
	h.types(t, "the plugin is installed", "apply -k mine")
	kubectl(t, "rollout", "restart", "-n", namespace, "daemonset/claims") // as freshSidecars does
	kubectl(t, "rollout", "status", "-n", namespace, "daemonset/claims", "--timeout="+patience.String())
	before := templates(t)
	t.Cleanup(func() { h.types(t, "", "kubectl delete") })
	h.types(t, "the first VM has its disk", "kubectl apply -f")
	h.types(t, "all claims are bound", "replicas=20")
	h.types(t, "all VMs have their disks", "rollout status statefulset")
	all := bootAll(t)
	eventually(t, "the logs of the VMs", func() string {
		names := regexp.MustCompile(`name: vm-\d+`).FindAllString(h.types(t, "", "kubectl logs"), -1)
		return fmt.Sprint(len(names), " say their names")
	}, fmt.Sprint(manyVMs, " say their names"))
	if built := templates(t) - before; built > 1 { // none, if the cluster has it already
		t.Errorf("%g templates were built, expected 1", built)
	}
	mustOwnDisks(t, all)
	for _, test := range []struct {
		name string
		run  func(*testing.T)
	}{
		{"expanded", testExpandedVM}, {"snapshot", testSnapshotOfVM}, {"hotplug", testHotplug}, {"reboot", testRebootedVM},
	} {
		if !t.Run(test.name, test.run) {
			return
		}
	}
}

// vms is the directory in which the how-to's commands are typed.
type vms string

// newVMs pushes the containerDisk, and writes the how-to's files. When the test ends, the usual install is back.
func newVMs(t *testing.T) vms {
	t.Helper()
	r := newRegistry(t)
	disk, err := os.ReadFile(filepath.Join(stateDir(), "images/disk.qcow2"))
	if err != nil {
		t.Fatal(err)
	}
	r.push(t, "vms/debian:12", archiveOf(t, "disk/", nil, "disk/debian.qcow2", disk))
	t.Cleanup(func() {
		_, err := cluster("", "kubectl", "delete", "configmap", "-n", namespace, "csi-disktemplate-contents", "--ignore-not-found")
		if err := errors.Join(err, install()); err != nil {
			t.Error(err)
		}
		freshSidecars(t)
		mustBeClean(t)
	})
	r.trust(t)
	dir := t.TempDir()
	mine := filepath.Join(dir, "mine")
	contents := replace(t, block(t, vmsDoc, "yaml", "disk: oci://"), "registry.example.com", r.address)
	kustomization := block(t, vmsDoc, "yaml", "configMapGenerator")
	if err := errors.Join(os.Symlink(root, filepath.Join(dir, "csi-disktemplate")), os.Mkdir(mine, 0o755),
		os.WriteFile(filepath.Join(mine, "contents.yaml"), []byte(contents), 0o644),
		os.WriteFile(filepath.Join(mine, "kustomization.yaml"), []byte(kustomization), 0o644)); err != nil {
		t.Fatal(err)
	}
	return vms(dir)
}

// types types the how-to's block that has a text, and logs how long that takes.
func (dir vms) types(t *testing.T, what, has string) string {
	t.Helper()
	start := time.Now()
	commands := block(t, vmsDoc, "sh", has)
	out := on(t, "timeout", "10m", "bash", "-euc", `cd "$1"; PATH=$STATE/bin:$PATH; eval "$2"`, "bash", string(dir), commands)
	if what != "" {
		t.Logf("%s: %.1f s", what, time.Since(start).Seconds())
	}
	return out
}

// bootAll waits until the guests of all VMs answer.
func bootAll(t *testing.T) (all []*vm) {
	t.Helper()
	start := time.Now()
	for i := range manyVMs {
		all = append(all, openVM(t, fmt.Sprint("vm-", i)))
	}
	t.Logf("all VMs have booted: %.1f s", time.Since(start).Seconds())
	return all
}

// mustOwnDisks has all VMs write to their disks, and then look at them: each finds everybody's and its own. Then only
// vm-0 stays.
func mustOwnDisks(t *testing.T, all []*vm) {
	t.Helper()
	for _, v := range all {
		v.says("everybody "+v.pod, "cat /mnt/names")
		v.run("echo of " + v.pod + " >/mnt/mine && sync && echo 3 >/proc/sys/vm/drop_caches")
	}
	for _, v := range all {
		v.says("lost+found mine names of "+v.pod, "ls /mnt && cat /mnt/mine")
		v.close()
	}
	eventually(t, "the log of the VM with a disk.img", func() string { return kubectl(t, "logs", "vm-of-image") },
		"booted from a disk of 512 MiB", "name: everybody", "name: vm-of-image")
	kubectl(t, "delete", "pod", "vm-of-image", "--timeout="+patience.String())
	kubectl(t, "scale", "statefulset", "vm", "--replicas=1")
	kubectl(t, "wait", "--for=delete", "pvc/disk-vm-19", "--timeout="+patience.String())
}

// testExpandedVM expands the claim of a VM that runs, and has QEMU look at the device's size, as libvirt does.
func testExpandedVM(t *testing.T) {
	v := openVM(t, "vm-0")
	v.says("524288", "cat /sys/block/vda/size") // 256Mi, in sectors
	sum := v.run("dd if=/bin/busybox of=/dev/vda bs=1M seek=200 conv=fsync 2>/dev/null && md5sum </bin/busybox")
	const larger = `{"spec": {"resources": {"requests": {"storage": "320Mi"}}}}`
	kubectl(t, "patch", "pvc", "disk-vm-0", "--patch", larger)
	const grown = "--for=jsonpath={.status.capacity.storage}=320Mi"
	kubectl(t, "wait", grown, "pvc/disk-vm-0", "--timeout="+patience.String())
	v.qmp("block_resize", map[string]any{"device": "disk", "size": 320 << 20})
	v.says("655360", "until [ $(cat /sys/block/vda/size) != 524288 ]; do sleep 0.1; done; cat /sys/block/vda/size")
	v.run("dd if=/bin/busybox of=/dev/vda bs=1M seek=300 conv=fsync 2>/dev/null; echo 3 >/proc/sys/vm/drop_caches")
	for _, at := range []string{"200", "300"} {
		v.says(sum, "dd if=/dev/vda bs=1M skip="+at+" count=4 2>/dev/null | head -c $(stat -c %s /bin/busybox) | md5sum")
	}
	v.says("of vm-0", "cat /mnt/mine")
}

// testSnapshotOfVM takes a snapshot while a VM writes, and boots another VM from it: what was synced before is there.
func testSnapshotOfVM(t *testing.T) {
	v := openVM(t, "vm-0")
	v.run("while ! [ -e /stop ]; do i=$((i+1)); echo $i >>/mnt/counts; sync; echo $i >/s; mv /s /synced; done >/dev/null 2>&1 &")
	v.run("while ! [ -e /stop ]; do dd if=/dev/zero of=/mnt/noise bs=64k count=16; done >/dev/null 2>&1 &")
	synced := v.run("until [ -e /synced ]; do sleep 0.1; done; cat /synced")
	const copied = `
apiVersion: snapshot.storage.k8s.io/v1
kind: VolumeSnapshot
metadata: {name: of-running}
spec: {volumeSnapshotClassName: disktemplate, source: {persistentVolumeClaimName: disk-vm-0}}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: restored}
spec:
  storageClassName: disktemplate-vm-content
  volumeMode: Block
  accessModes: [ReadWriteOnce]
  dataSource: {apiGroup: snapshot.storage.k8s.io, kind: VolumeSnapshot, name: of-running}
  resources: {requests: {storage: 320Mi}}
`
	apply(t, copied)
	const made = "--for=jsonpath={.status.readyToUse}=true"
	kubectl(t, "wait", made, "volumesnapshot/of-running", "--timeout="+patience.String())
	v.run("n=$(cat /synced); until [ $(cat /synced) -gt $((n + 1)) ]; do sleep 0.1; done")
	v.run("touch /stop; until umount /mnt 2>/dev/null; do sleep 0.1; done; mount -t ext4 /dev/vda2 /mnt && rm /mnt/noise")
	last := v.run("tail -n 1 /mnt/counts")
	apply(t, vmOf(t, "restored", "restored"))
	r := openVM(t, "restored")
	r.says("1", "dmesg | grep -c 'EXT4-fs (vda2): recovery complete'")
	r.says(synced, "grep -x "+synced+" /mnt/counts")
	r.run("[ $(wc -l </mnt/counts) -lt " + last + " ]") // the other one has written on
	r.says("everybody vm-0 restored of vm-0", "cat /mnt/names /mnt/mine")
	remove(t, vmOf(t, "restored", "restored"))
	remove(t, copied)
}

// vmOf is the manifest of a VM as the example has them, whose disk is another claim.
func vmOf(t *testing.T, name, claim string) string {
	t.Helper()
	var spec map[string]any
	decode(t, get(t, "statefulset vm", ".spec.template.spec"), &spec)
	disk := map[string]any{"name": "disk", "persistentVolumeClaim": map[string]any{"claimName": claim}}
	spec["volumes"] = append(spec["volumes"].([]any), disk)
	pod := map[string]any{"apiVersion": "v1", "kind": "Pod", "metadata": map[string]any{"name": name}, "spec": spec}
	b, err := json.Marshal(pod)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// testHotplug plugs disks into a VM that runs, and unplugs them. An attachment pod has their claims. A thin one gives
// back what the guest trims, and a thick one keeps it. A block claim works with any size of sectors.
func testHotplug(t *testing.T) {
	v, names := openVM(t, "vm-0"), []string{"thin", "thick", "image"}
	apply(t, hotplugged)
	ready(t, "attachment")
	for _, name := range names {
		driver, give := "host_device", v.giveDevice
		if name == "image" {
			driver, give = "file", v.giveImage
		}
		give("attachment", "hot-"+name)
		disk := v.plug("hot-"+name, driver, nil)
		v.says("262144", "cat /sys/block/"+disk+"/size") // 128Mi
		v.run("mkdir -p /hot && mount -t ext4 /dev/" + disk + " /hot && echo is " + name + " >/hot/name")
		v.run("dd if=/dev/zero of=/hot/noise bs=1M count=48 conv=fsync 2>/dev/null")
		full := allocated(t, "hot-"+name)
		v.run("rm /hot/noise && sync && fstrim /hot")
		if after := allocated(t, "hot-"+name); (full-after >= 40<<20) != (name != "thick") {
			t.Errorf("%s has %d bytes, and after fstrim %d", name, full, after)
		}
		v.run("umount /hot")
		v.unplug("hot-" + name)
		v.run("! grep -lx hot-" + name + " /sys/block/*/serial")
	}
	sum := ""
	for _, sectors := range [][2]int{{512, 512}, {512, 4096}, {4096, 4096}, {512, 512}} {
		sizes := map[string]any{"logical_block_size": sectors[0], "physical_block_size": sectors[1]}
		disk := v.plug("hot-thin", "host_device", sizes)
		queue := "/sys/block/" + disk + "/queue/"
		v.says(fmt.Sprint(sectors[0], " ", sectors[1]), "cat "+queue+"logical_block_size "+queue+"physical_block_size")
		v.says("is thin", "mount -t ext4 /dev/"+disk+" /hot && cat /hot/name")
		if sum != "" {
			v.says(sum, "md5sum </hot/random")
		}
		sum = v.run(fmt.Sprintf("dd if=/dev/urandom of=/random bs=%[1]d count=129 2>/dev/null && "+
			"dd if=/random of=/hot/random bs=%[1]d oflag=direct conv=fsync 2>/dev/null && md5sum </random", sectors[0]))
		v.run("umount /hot")
		v.unplug("hot-thin")
	}
	for _, name := range names {
		v.take("hot-" + name)
	}
	remove(t, hotplugged)
}

// hotplugged is an attachment pod as KubeVirt makes it, which only has the claims.
var hotplugged = func() string {
	class := func(name, mode, parameters string) string {
		return fmt.Sprintf(`
apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata: {name: hot-%s}
provisioner: csi.disktemplate.io
volumeBindingMode: WaitForFirstConsumer
parameters: {format: ext4%s}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: hot-%[1]s}
spec:
  storageClassName: hot-%[1]s
  volumeMode: %[3]s
  accessModes: [ReadWriteOnce]
  resources: {requests: {storage: 128Mi}}
---`, name, parameters, mode)
	}
	return class("thin", "Block", "") + class("thick", "Block", ", provisioning: thick") +
		class("image", "Filesystem", ", publishAs: diskImage") + `
apiVersion: v1
kind: Pod
metadata: {name: attachment}
spec:
  terminationGracePeriodSeconds: 1
  securityContext: {runAsUser: 107, runAsGroup: 107}
  containers:
  - name: attachment
    image: busybox:1.37
    command: [sleep, infinity]
    volumeDevices: [{name: thin, devicePath: /path/thin}, {name: thick, devicePath: /path/thick}]
    volumeMounts: [{name: image, mountPath: /path/image}]
  volumes:
  - {name: thin, persistentVolumeClaim: {claimName: hot-thin}}
  - {name: thick, persistentVolumeClaim: {claimName: hot-thick}}
  - {name: image, persistentVolumeClaim: {claimName: hot-image}}
`
}()

// allocated is what a claim takes of the pool, in bytes.
func allocated(t *testing.T, claim string) int64 {
	t.Helper()
	var list struct {
		Volumes []struct {
			Claim          string
			AllocatedBytes int64
		}
	}
	out := kubectl(t, "exec", "-n", namespace, plugin(t), "--", "csi-disktemplate", "volume", "list", "-o", "json")
	decode(t, out, &list)
	name := get(t, "pvc "+claim, ".spec.volumeName")
	for _, v := range list.Volumes {
		if v.Claim == name {
			return v.AllocatedBytes
		}
	}
	t.Fatalf("the plugin has no %s", name)
	return 0
}

// testRebootedVM takes the power from the node of a VM that runs. The VM boots again, from its disk.
func testRebootedVM(t *testing.T) {
	v := openVM(t, "vm-0")
	v.run("echo before the power cut >/mnt/mine && sync")
	if _, err := cluster("", "reboot"); err != nil {
		t.Fatal(err)
	}
	v = openVM(t, "vm-0")
	v.says("everybody vm-0 vm-0 before the power cut", "cat /mnt/names /mnt/mine")
	v.says("655360", "cat /sys/block/vda/size")
	pluginReady(t)
}
