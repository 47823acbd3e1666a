// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package driver

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// TestDiskImageIsReported: a pod makes its disk.img larger, on a pool where the kernel does not bound it. The log, /readyz
// and the metrics say so, although nobody calls the plugin.
func TestDiskImageIsReported(t *testing.T) {
	n := newNode(t, testenv.XFS, 1<<30)
	p := n.start()
	r := p.request("grows", "ext4", "size", "64Mi", "publishAs", "diskImage")
	p.publish(r)
	defer p.unpublish(r)
	if code, body := p.get("/readyz"); code != 200 || body != "ok\n" {
		t.Errorf("/readyz before: %d %s", code, body)
	}
	if err := os.Truncate(filepath.Join(r.GetTargetPath(), image.DiskName), 1<<40); err != nil {
		t.Fatal(err)
	}
	began := func() []string {
		return p.log.lines(`] "A condition began`, `condition="DiskImageGrown"`, `object="grows"`, "1Ti", "delete the pod")
	}
	p.await("a line of the log", func() bool { return len(began()) > 0 })
	if code, body := p.get("/readyz"); code != 200 || !strings.HasPrefix(body, "ok\ndegraded: DiskImageGrown since ") {
		t.Errorf("/readyz: %d %s", code, body)
	}
	if got := p.metric(`csi_disktemplate_condition{code="DiskImageGrown"}`); got != 1 {
		t.Errorf("the metric is %v", got)
	}
	if lines := began(); len(lines) != 1 || !strings.HasPrefix(lines[0], "W") {
		t.Errorf("the log says\n%s", lines)
	}
}
