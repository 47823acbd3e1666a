// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build e2e

package e2e

import (
	"strings"
	"testing"
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
	for object, field := range map[string]string{
		"pv pvc-elsewhere": ".spec.nodeAffinity", "volumesnapshotcontent elsewhere": ".metadata.labels",
	} {
		if got := get(t, object, field); !strings.Contains(got, "node2") {
			t.Errorf("%s does not name the node: %s", object, got)
		}
	}
	// The claim has a node only while a provisioner is asked. At any other time its warning tells the same.
	eventually(t, "kubectl disktemplate why cloned-away", func() string {
		said, _ := disktemplate("why", "cloned-away")
		return said
	}, "put the pod there")
}
