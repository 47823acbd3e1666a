// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package driver

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
)

// TestDurability makes volumes volatile by the operator's default and by the pod's attribute,
// kills the plugin, starts it with another default, and starts it after a reboot.
func TestDurability(t *testing.T) {
	n := newNode(t, testenv.XFS, 1<<30)
	request := func(id string, attributes ...string) *csi.NodePublishVolumeRequest {
		return n.request(id, "ext4", append(attributes, "size", "64Mi")...)
	}
	byDefault, asked, synced := request("default"), request("asked", "durability", "volatile"), request("synced", "durability", "synced")
	all := []*csi.NodePublishVolumeRequest{byDefault, asked, synced}
	p := n.start("--default-durability", "volatile")
	for _, r := range all {
		p.publish(r)
		if err := os.WriteFile(filepath.Join(r.TargetPath, "file"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		want := "volatile"
		if r == synced {
			want = "synced"
		}
		if len(p.log.lines(`"NodePublishVolume"`, fmt.Sprintf("volume=%q", r.VolumeId), fmt.Sprintf("durability=%q", want))) != 1 {
			t.Errorf("the log does not say that volume %s is %s", r.VolumeId, want)
		}
	}
	n.mustDrop(byDefault, asked)

	// A crash loses nothing, and an upgrade to another default changes nothing.
	p.Kill()
	p = n.start()
	for _, r := range all {
		p.mustKeep(func() { p.publish(r) })
		p.mustHaveFile(r, true)
	}
	n.mustDrop(byDefault, asked)
	other := n.request("asked", "ext4", "size", "64Mi", "durability", "synced")
	_, err := p.NodePublishVolume(t.Context(), other)
	mustSay(t, err, codes.AlreadyExists, "durability", "volatile", "synced")

	// After a reboot nothing is mounted.
	p.Kill()
	for _, r := range all {
		testenv.Umount(t, r.TargetPath)
		n.inAnotherBoot(r)
	}
	testenv.NoLoopsBelow(t, n.Pool)
	p = n.start()
	for _, r := range all {
		p.publish(r)
		p.mustHaveFile(r, r == synced)
		p.mustReport(r, r != synced)
	}
	// The default is another one, and the volume was made again.
	n.mustDrop(asked)
	for _, r := range all {
		p.unpublish(r)
	}
}

// inAnotherBoot gives the record of a volatile volume the id of another boot.
func (n *node) inAnotherBoot(r *csi.NodePublishVolumeRequest) {
	n.t.Helper()
	path, record := filepath.Join(n.Pool, "volumes", r.VolumeId), make([]byte, 4096)
	size, err := syscall.Getxattr(path, string(pool.VolumeAttr), record)
	if err != nil {
		n.t.Fatal(err)
	}
	other := regexp.MustCompile(`"boot":"[0-9a-f-]{36}"`).ReplaceAll(record[:size], []byte(`"boot":"another"`))
	if err := syscall.Setxattr(path, string(pool.VolumeAttr), other, 0); err != nil {
		n.t.Fatal(err)
	}
}

// mustDrop checks that the loop devices of exactly these volumes drop flushes.
func (n *node) mustDrop(volatile ...*csi.NodePublishVolumeRequest) {
	n.t.Helper()
	for _, id := range []string{"default", "asked", "synced"} {
		r := n.request(id, "ext4")
		source := strings.TrimSpace(testenv.Run(n.t, "findmnt", "-n", "-o", "SOURCE", "--mountpoint", r.TargetPath))
		mode, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(source), "queue/write_cache"))
		want := "write back"
		if slices.ContainsFunc(volatile, func(v *csi.NodePublishVolumeRequest) bool { return v.VolumeId == id }) {
			want = "write through"
		}
		if err != nil || strings.TrimSpace(string(mode)) != want {
			n.t.Errorf("volume %s is on %s in the mode %q, want %q: %v", id, source, mode, want, err)
		}
	}
}

func (p *plugin) mustHaveFile(r *csi.NodePublishVolumeRequest, want bool) {
	p.t.Helper()
	if _, err := os.Lstat(filepath.Join(r.TargetPath, "file")); (err == nil) != want || err != nil && !errors.Is(err, os.ErrNotExist) {
		p.t.Errorf("volume %s holds its file: %v, want %v", r.VolumeId, err, want)
	}
}

// mustReport checks that the log and the health of a volume say that its content was lost, or that
// neither does.
func (p *plugin) mustReport(r *csi.NodePublishVolumeRequest, want bool) {
	p.t.Helper()
	logged := len(p.log.lines(`] "The node has rebooted since a volatile volume was made`, fmt.Sprintf("volume=%q", r.VolumeId)))
	health, err := p.NodeGetVolumeHealth(p.t.Context(), &csi.NodeGetVolumeHealthRequest{VolumeId: r.VolumeId, VolumePublishPath: r.TargetPath})
	if err != nil {
		p.t.Fatal(err)
	}
	found := health.GetVolumeHealth().GetHealthStatuses()
	p.t.Log(found)
	has := len(found) == 1 && found[0].GetReason() == "VolatileContentLost" && found[0].GetStatus() == csi.VolumeHealthErrorType_DATA_LOSS
	if (logged == 1) != want || has != want || !want && len(found) > 0 {
		p.t.Errorf("volume %s: %d lines in the log, and the conditions %v", r.VolumeId, logged, found)
	}
}
