// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package harnesstest is package harness for tests: an error ends the test, and what was started ends with it.
package harnesstest

import (
	"testing"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/internal/harness"
	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
)

// New makes a node on a pool. What a failed test leaves of volumes is reported and taken away.
func New(t testing.TB, pool string) harness.Node {
	t.Helper()
	n := harness.Node{Pool: pool, Kubelet: testenv.Dir(t)}
	if err := n.Make(); err != nil {
		t.Fatal(err)
	}
	// Without it, removing the directory would empty what is mounted in it.
	t.Cleanup(func() { testenv.Sweep(t, n.Kubelet, n.Pool) })
	return n
}

// Connect connects to the node's plugin until the test ends.
func Connect(t testing.TB, n harness.Node) *harness.Client {
	t.Helper()
	c, err := n.Connect()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Conn.Close() })
	return c
}

// Launch starts a plugin, whose log is removed after the test, and does not wait until it serves.
func Launch(t testing.TB, n harness.Node, c harness.Command) *harness.Plugin {
	t.Helper()
	c.LogDir = t.TempDir()
	p, err := n.Start(c)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// Find lists what there is of volumes.
func Find(t testing.TB, n harness.Node) []string {
	t.Helper()
	found, err := n.Find()
	if err != nil {
		t.Fatal(err)
	}
	return found.List()
}

// Settles waits until a text is the wanted one, and returns the last. On a node udev may hold a block device open for a
// moment, and a process that is being started may have a copy of a mount. Where many tests run at once, that takes seconds.
func Settles(get func() string, want string) (got string) {
	deadline := time.Now().Add(30 * time.Second)
	for got = get(); got != want && time.Now().Before(deadline); got = get() {
		time.Sleep(5 * time.Millisecond)
	}
	return got
}
