// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build e2e

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
)

// elsewhere is a claim and a snapshot of another node, as Kubernetes knows them. No kubelet serves that node.
const elsewhere = `
apiVersion: v1
kind: PersistentVolume
metadata: {name: pvc-elsewhere}
spec:
  accessModes: [ReadWriteOnce]
  capacity: {storage: 64Mi}
  storageClassName: disktemplate-ext4
  persistentVolumeReclaimPolicy: Retain
  claimRef: {namespace: default, name: elsewhere}
  csi: {driver: csi.disktemplate.io, volumeHandle: pvc-elsewhere, fsType: ext4}
  nodeAffinity: {required: {nodeSelectorTerms: [{matchExpressions: [
    {key: topology.csi.disktemplate.io/node, operator: In, values: [node2]}]}]}}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: elsewhere}
spec:
  storageClassName: disktemplate-ext4
  volumeName: pvc-elsewhere
  accessModes: [ReadWriteOnce]
  resources: {requests: {storage: 64Mi}}
---
apiVersion: snapshot.storage.k8s.io/v1
kind: VolumeSnapshotContent
metadata:
  name: elsewhere
  labels: {snapshot.storage.kubernetes.io/managed-by: node2}
spec:
  deletionPolicy: Retain
  driver: csi.disktemplate.io
  source: {snapshotHandle: snapshot-elsewhere}
  volumeSnapshotRef: {name: elsewhere, namespace: default}
---
apiVersion: snapshot.storage.k8s.io/v1
kind: VolumeSnapshot
metadata: {name: elsewhere}
spec: {source: {volumeSnapshotContentName: elsewhere}}
---
`

// withElsewhere makes these objects and says of them what the other node would say.
func withElsewhere(t *testing.T) {
	t.Helper()
	t.Cleanup(func() { // the other node's snapshotter would let go of them
		for _, object := range []string{"volumesnapshot/elsewhere", "volumesnapshotcontent/elsewhere"} {
			cluster("", "kubectl", "patch", object, "--type=merge", "--patch", `{"metadata": {"finalizers": null}}`)
			kubectl(t, "wait", "--for=delete", object, "--timeout="+patience.String())
		}
	})
	apply(t, elsewhere)
	kubectl(t, "wait", "--for=jsonpath={.status.phase}=Bound", "pvc/elsewhere", "--timeout="+patience.String())
	kubectl(t, "patch", "volumesnapshotcontent", "elsewhere", "--subresource=status", "--type=merge", "--patch",
		`{"status": {"readyToUse": true, "restoreSize": 67108864, "snapshotHandle": "snapshot-elsewhere", "creationTime": 1}}`)
	kubectl(t, "wait", "--for=jsonpath={.status.readyToUse}=true", "volumesnapshot/elsewhere", "--timeout="+patience.String())
}

// copyOf makes the manifest of a claim that is a copy of another object, and of a pod that uses it.
func copyOf(t *testing.T, name, source string) string {
	t.Helper()
	return replace(t, claim(name, "disktemplate-ext4", "64Mi"), "accessModes:", "dataSource: "+source+", accessModes:")
}

// TestCopyOnWrongNode reads what the events of a copy say on a node that does not have its source. The last claim and
// its pod are as CDI makes them for a clone: both are pinned to the node of the clone's target, and no scheduler chooses
// another node. The provisioner drops the annotation, and the claim stays Pending.
func TestCopyOnWrongNode(t *testing.T) {
	withElsewhere(t)
	const (
		ofClaim    = "{kind: PersistentVolumeClaim, name: elsewhere}"
		ofSnapshot = "{apiGroup: snapshot.storage.k8s.io, kind: VolumeSnapshot, name: elsewhere}"
		selected   = `.metadata.annotations.volume\.kubernetes\.io/selected-node`
	)
	apply(t, copyOf(t, "cloned-away", ofClaim)+copyOf(t, "restored-away", ofSnapshot)+replace(t, copyOf(t, "tmp-pvc", ofClaim),
		"PersistentVolumeClaim\nmetadata: {name: tmp-pvc", "PersistentVolumeClaim\nmetadata: {annotations: {volume.kubernetes.io/selected-node: node1}, name: tmp-pvc",
		"spec:\n  termination", "spec:\n  nodeName: node1\n  termination"))
	for name, says := range map[string][]string{
		"cloned-away":   {"volume pvc-elsewhere is not here", "nodeAffinity of its PersistentVolume names it"},
		"restored-away": {"snapshot snapshot-elsewhere is not here", "snapshot.storage.kubernetes.io/managed-by of its VolumeSnapshotContent names it"},
		"tmp-pvc":       {"volume pvc-elsewhere is not here", "nodeAffinity of its PersistentVolume names it"},
	} {
		always := []string{"ProvisioningFailed", "ResourceExhausted", "a copy is made on the node of its source; put the pod there"}
		eventually(t, "the events of "+name, func() string { return events(t, name) }, append(always, says...)...)
	}
	eventually(t, "tmp-pvc", func() string {
		return get(t, "pvc tmp-pvc", ".status.phase") + ", its node: " + get(t, "pvc tmp-pvc", selected) + "."
	}, "Pending, its node: .")
	mustFindNode(t)
	// The claim has a node only while a provisioner is asked. At any other time its warning tells the same.
	eventually(t, "kubectl disktemplate why cloned-away", func() string {
		said, _ := disktemplate("why", "cloned-away")
		return said
	}, "put the pod there")
}

// mustFindNode types what docs/claims.md says about finding the source's node.
func mustFindNode(t *testing.T) {
	t.Helper()
	doc, err := os.ReadFile(filepath.Join(root, "docs/claims.md"))
	if err != nil {
		t.Fatal(err)
	}
	objects := map[string]string{"pv": "pvc-elsewhere", "volumesnapshotcontent": "elsewhere"}
	lines := regexp.MustCompile(`(?m)^kubectl get (\S+) \S+ -o jsonpath='\{(\S+)\}'`).FindAllStringSubmatch(string(doc), -1)
	if len(lines) != len(objects) {
		t.Errorf("docs/claims.md says how to find the node: %q", lines)
	}
	for _, line := range lines {
		if got := get(t, line[1]+" "+objects[line[1]], line[2]); !strings.Contains(got, "node2") {
			t.Errorf("%s does not name the node: %s", line[0], got)
		}
	}
}

// dataVolumeObject is what these tests read of a DataVolume.
type dataVolumeObject struct {
	Metadata struct{ Name string }
	Spec     struct {
		Storage struct {
			StorageClassName string
			Resources        struct{ Requests struct{ Storage string } }
		}
	}
}

// dataVolume is a DataVolume with what CDI takes from the profile of its class. These tests do with it what CDI does. CDI
// makes the target claim, which no provisioner fills, and another one, prime-…, that a pod of CDI's fills. When the pod has
// ended, the volume becomes the target's.
type dataVolume struct {
	name, class, size string
	mode, access      string
}

// storageProfile is what CDI reads of a StorageProfile.
type storageProfile struct {
	Spec struct {
		ClaimPropertySets []struct {
			AccessModes []string
			VolumeMode  string
		}
		CloneStrategy, DataImportCronSourceFormat, SnapshotClass string
	}
}

func profileOf(t *testing.T, class string) (p storageProfile) {
	t.Helper()
	decode(t, kubectl(t, "get", "storageprofile", class, "-o", "json"), &p)
	return p
}

// dataVolumeOf takes the first set of the profile, as CDI does where a DataVolume names no mode.
func dataVolumeOf(t *testing.T, name string, o dataVolumeObject) dataVolume {
	t.Helper()
	storage := o.Spec.Storage
	set := profileOf(t, storage.StorageClassName).Spec.ClaimPropertySets[0]
	return dataVolume{name, storage.StorageClassName, storage.Resources.Requests.Storage, set.VolumeMode, set.AccessModes[0]}
}

// dataVolumes are those that were applied, by name.
func dataVolumes(t *testing.T) map[string]dataVolume {
	t.Helper()
	var list struct{ Items []dataVolumeObject }
	decode(t, kubectl(t, "get", "datavolumes", "-o", "json"), &list)
	all := map[string]dataVolume{}
	for _, o := range list.Items {
		all[o.Metadata.Name] = dataVolumeOf(t, o.Metadata.Name, o)
	}
	return all
}

// cronImport is the DataVolume that a DataImportCron makes. Its name ends with digits of the image's digest.
func cronImport(t *testing.T, managed string) dataVolume {
	t.Helper()
	var cron struct {
		Spec struct {
			ManagedDataSource string
			Template          dataVolumeObject
		}
	}
	decode(t, kubectl(t, "get", "dataimportcron", managed, "-o", "json"), &cron)
	return dataVolumeOf(t, cron.Spec.ManagedDataSource+"-0123456789ab", cron.Spec.Template)
}

// claim makes the manifest of a claim with the size and modes of the DataVolume, from a source if it has one.
func (d dataVolume) claim(name, from string) string {
	return fmt.Sprintf(`
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: %s}
spec:
  storageClassName: %s
  volumeMode: %s
  accessModes: [%s]
  resources: {requests: {storage: %s}}
  %s
---
`, name, d.class, d.mode, d.access, d.size, from)
}

func (d dataVolume) prime() string { return "prime-" + d.name }

// target makes the manifest of the claim that gets the volume in the end.
func (d dataVolume) target() string {
	return d.claim(d.name, "dataSourceRef: {apiGroup: cdi.kubevirt.io, kind: VolumeImportSource, name: "+d.name+"}")
}

// scratch makes the manifest of the claim for scratch space: of the target's class, which names a filesystem for it or
// gets ext4, and 6% larger.
func (d dataVolume) scratch() string {
	bytes, err := size.Parse(d.size)
	if err != nil {
		panic(err)
	}
	d.size, d.mode = fmt.Sprint((bytes*106+99)/100), "Filesystem"
	return d.claim(d.prime()+"-scratch", "")
}

// importer makes the manifest of what imports an image: the claims, and a pod that has the image as a qcow2 in its scratch
// space and converts it into the target.
func (d dataVolume) importer() string {
	target, scratch := podDisk{"target", d.prime(), d.mode}, podDisk{"scratch", d.prime() + "-scratch", "Filesystem"}
	command := fmt.Sprintf("set -e; cd %s; yes %s | head -c %d >raw; qemu-img convert -O qcow2 raw disk.qcow2; rm raw; "+
		"qemu-img convert -t writeback -p -O raw disk.qcow2 %s", scratch.mount(), d.name, imageBytes, target.path())
	return d.claim(d.prime(), "") + d.scratch() + once(unprivileged("importer-"+d.prime(), command, []podDisk{target, scratch}))
}

// populated waits until the importer has ended, and gives its volume to the target.
func (d dataVolume) populated(t *testing.T) {
	t.Helper()
	outcome(t, "importer-"+d.prime(), "Succeeded")
	kubectl(t, "delete", "pod,pvc", "importer-"+d.prime(), d.prime()+"-scratch", "--ignore-not-found", "--wait=false")
	d.rebind(t, d.prime())
}

// rebind gives the volume of another claim to the target.
func (d dataVolume) rebind(t *testing.T, from string) {
	t.Helper()
	volume, uid := get(t, "pvc "+from, ".spec.volumeName"), get(t, "pvc "+d.name, ".metadata.uid")
	kubectl(t, "patch", "pv", volume, "--type=merge", "--patch", fmt.Sprintf(
		`{"spec": {"claimRef": {"namespace": "default", "name": %q, "uid": %q, "resourceVersion": null}}}`, d.name, uid))
	kubectl(t, "delete", "pvc", from, "--wait=false")
	kubectl(t, "wait", "--for=jsonpath={.status.phase}=Bound", "pvc/"+d.name, "--timeout="+patience.String())
}

// clone fills the target as the profile says: with a copy, or with a clone of a snapshot of the other.
func (d dataVolume) clone(t *testing.T, of dataVolume) {
	t.Helper()
	profile := profileOf(t, d.class).Spec
	switch profile.CloneStrategy + " of " + profile.DataImportCronSourceFormat {
	case "copy of pvc":
		source, target := podDisk{"source", of.name, of.mode}, podDisk{"target", d.prime(), d.mode}
		// CDI reads all of it, which takes half a minute.
		command := fmt.Sprintf("dd if=%s of=%s bs=1M count=%d conv=fsync", source.path(), target.path(), imageBytes>>20)
		apply(t, d.claim(d.prime(), "")+once(unprivileged("importer-"+d.prime(), command, []podDisk{source, target})))
		d.populated(t)
	case "snapshot of snapshot":
		apply(t, fmt.Sprintf(`
apiVersion: snapshot.storage.k8s.io/v1
kind: VolumeSnapshot
metadata: {name: %[1]s}
spec: {volumeSnapshotClassName: %[2]s, source: {persistentVolumeClaimName: %[1]s}}
---
`, of.name, profile.SnapshotClass))
		kubectl(t, "wait", "--for=jsonpath={.status.readyToUse}=true", "volumesnapshot/"+of.name, "--timeout="+patience.String())
		apply(t, d.claim(d.prime(), "dataSource: {apiGroup: snapshot.storage.k8s.io, kind: VolumeSnapshot, name: "+of.name+"}")+
			once(unprivileged("importer-"+d.prime(), "echo hello cdi", []podDisk{{"target", d.prime(), d.mode}})))
		d.populated(t)
	default:
		t.Fatalf("the profile of %s says %+v", d.class, profile)
	}
}

// podDisk is a claim in a pod.
type podDisk struct{ name, claim, mode string }

func (d podDisk) mount() string { return "/disks/" + d.name }

// path is where a pod finds the disk.
func (d podDisk) path() string {
	if d.mode == "Block" {
		return "/dev/" + d.name
	}
	return d.mount() + "/disk.img"
}

// unprivileged makes the manifest of a pod as CDI and KubeVirt make theirs: with the user 107 and no privileges.
func unprivileged(name, command string, disks []podDisk) string {
	var devices, mounts, volumes string
	for _, d := range disks {
		if d.mode == "Block" {
			devices += fmt.Sprintf("{name: %s, devicePath: %s}, ", d.name, d.path())
		} else {
			mounts += fmt.Sprintf("{name: %s, mountPath: %s}, ", d.name, d.mount())
		}
		volumes += fmt.Sprintf("{name: %s, persistentVolumeClaim: {claimName: %s}}, ", d.name, d.claim)
	}
	return fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: %s}
spec:
  terminationGracePeriodSeconds: 0
  restartPolicy: Always
  securityContext: {runAsUser: 107, runAsGroup: 107, fsGroup: 107, runAsNonRoot: true, seccompProfile: {type: RuntimeDefault}}
  containers:
  - name: main
    image: tianon/qemu:7.2
    command: [sh, -c, %q]
    securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
    volumeDevices: [%s]
    volumeMounts: [%s]
  volumes: [%s]
---
`, name, command, devices, mounts, volumes)
}

// once has a pod run again only if it fails.
func once(pod string) string {
	return strings.ReplaceAll(pod, "restartPolicy: Always", "restartPolicy: OnFailure")
}
