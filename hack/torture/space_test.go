// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package torture

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/fsctl"
)

// TestSpaceReturns writes 1 GiB to one claim after the other, on a disk with room for a few of
// them. Each claim's space must be back in time for the next, and all of it at the end.
func TestSpaceReturns(t *testing.T) {
	rounds := count(t, 6)
	onPools(t, false, func(n *node) {
		disk := filepath.Dir(n.filler())
		available := func() int64 {
			testenv.Run(t, "sync", "-f", n.Pool)
			testenv.Run(t, "sync", "-f", disk)
			st, err := fsctl.StatusAt(disk)
			n.must("the disk", err)
			return st.Available
		}
		filesystems := []string{"ext4", "xfs", "btrfs"}
		round := func(i int, bytes int) {
			d := claim(fmt.Sprint("round-", i), filesystems[i%3], "filesystem")
			d.bytes = 2 << 30
			n.must("using a claim", n.run(create(d), stage(d), publish(d)))
			n.must("writing 1 GiB", writeMuch(filepath.Join(n.volume(d).Target, "file"), bytes))
			for _, s := range unuse(d) { // it may be trimmed at that moment, so the first try may be too early
				n.must("deleting the claim", n.until(func() error { return n.run(s) }))
			}
		}
		for i := range filesystems { // builds the templates
			round(i, mib)
		}
		before := available()
		for i := range rounds {
			round(i, 1024*mib)
		}
		testenv.Eventually(t, "the space to come back", func() bool { return available() > before-64*mib })
		t.Logf("after %d rounds the disk has %d KiB less", rounds, (before-available())>>10)
	}, inLoopback)
}

// writeMuch writes and syncs a file of so many bytes.
func writeMuch(path string, size int) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	block := bytes.Repeat([]byte("data"), mib/4)
	for range size / mib {
		if _, err := f.Write(block); err != nil {
			return err
		}
	}
	return f.Sync()
}
