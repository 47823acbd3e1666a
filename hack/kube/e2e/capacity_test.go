// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build e2e

package e2e

import (
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"
)

// TestPoolFull asks for more space than there is. The node's pool has 20 GiB.
func TestPoolFull(t *testing.T) {
	t.Cleanup(func() { mustBeClean(t) })
	apply(t, claim("too-large", "disktemplate-ext4", "30Gi"))
	eventually(t, "the pod's events", func() string { return events(t, "too-large") }, "did not have enough free storage")

	class := `
apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata: {name: thick}
provisioner: csi.disktemplate.io
volumeBindingMode: WaitForFirstConsumer
parameters: {provisioning: thick}
---
`
	apply(t, class)
	apply(t, claim("hog", "thick", strconv.FormatInt(emptyCapacity(t, "thick")>>20-256, 10)+"Mi"))
	filler := inline("filler", "xfs", "size: 1Gi")
	apply(t, filler)
	ready(t, "hog", "filler")
	kubectl(t, "exec", "filler", "--", "dd", "if=/dev/zero", "of=/data/f", "bs=1M", "count=400", "conv=fsync")
	apply(t, inline("no-room", "ext4", "size: 64Mi"))
	t.Log(eventually(t, "the pod's events", func() string { return events(t, "no-room") }, "FailedMount", "ResourceExhausted", "pool is full", "headroom", "delete volumes"))
	remove(t, filler)
	ready(t, "no-room") // kubelet repeats the call
}

// capacity returns what the scheduler knows of a class's capacity, in bytes.
func capacity(t testing.TB, class string) int64 {
	t.Helper()
	var list struct {
		Items []struct {
			StorageClassName string
			Capacity         string
		}
	}
	decode(t, kubectl(t, "get", "csistoragecapacities", "-A", "-o", "json"), &list)
	for _, c := range list.Items {
		if c.StorageClassName == class {
			n, err := strconv.ParseInt(strings.TrimSuffix(c.Capacity, "Mi"), 10, 64)
			if err == nil {
				return n << 20
			}
			if c.Capacity != "0" && c.Capacity != "" {
				t.Fatalf("the capacity of %s is %q", class, c.Capacity)
			}
		}
	}
	return 0
}

// emptyCapacity waits until the scheduler knows the capacity of a pool without claims, and returns it. The provisioner
// publishes a deletion a second or two after it: the claims of an earlier test may be gone from the pool and still count.
func emptyCapacity(t testing.TB, class string) int64 {
	t.Helper()
	mustBeClean(t)
	var n int64
	since := time.Now()
	eventually(t, "the capacity of "+class, func() string {
		if now := capacity(t, class); now != n {
			n, since = now, time.Now()
		}
		return fmt.Sprintf("%d MiB, of an empty pool: %v", n>>20, n > 18<<30 && time.Since(since) > 4*time.Second)
	}, "pool: true")
	return n
}

// TestCapacityFollows makes and deletes a claim, and finds both in the capacity that the scheduler knows.
func TestCapacityFollows(t *testing.T) {
	t.Cleanup(func() { mustBeClean(t) })
	follows := func(what string, want func(int64) bool) {
		t.Helper()
		eventually(t, what, func() string {
			now := capacity(t, "disktemplate-xfs")
			return fmt.Sprintf("%d MiB, as it should be: %v", now>>20, want(now))
		}, "be: true")
	}
	before := emptyCapacity(t, "disktemplate-xfs")
	c := claim("takes-room", "disktemplate-xfs", "5Gi")
	apply(t, c)
	ready(t, "takes-room")
	follows("the capacity beside a claim of 5 GiB", func(n int64) bool { return n <= before-5<<30 })
	remove(t, c)
	// Its template stays, and the VM that made it: 64 MiB and 130 MiB.
	follows("the capacity after it", func(n int64) bool { return n >= before-256<<20 })
}
