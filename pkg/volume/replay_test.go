// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package volume

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/mount"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
)

// TestMountedOutlivesStart mounts a filesystem for a moment, while a process is started that has a copy of the mount's
// descriptor, as any has until its program runs. Afterwards the filesystem is unmounted, and can be given an identity. If
// the process keeps the copy for too long, the error says that the work is under way.
func TestMountedOutlivesStart(t *testing.T) {
	n := newNode(t, testenv.XFS, 2*gib)
	v := n.mustCreate(claim("v", "xfs", 300*mib))
	f, err := os.OpenFile(n.pool.Volume(v.ID), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fs, err := diskfs.Lookup("xfs")
	if err != nil {
		t.Fatal(err)
	}
	beside := func(cmd *exec.Cmd) error {
		return n.copies.mounted(f, fs, "replay", func(m *mount.Detached) error {
			root := fmt.Sprintf("/proc/self/fd/%d", m.File().Fd())
			file, err := os.Create(root + "/file") // the log must not look as if nothing had been mounted
			if err == nil {
				err = errors.Join(file.Sync(), file.Close())
			}
			if err != nil {
				return err
			}
			cmd.ExtraFiles = []*os.File{m.File()}
			return cmd.Start()
		})
	}
	short := exec.Command("sleep", "0.5")
	if err := beside(short); err != nil {
		t.Fatal(err)
	}
	if err := fs.NewIdentity(f, f, v.UUID); err != nil {
		t.Error(err)
	}
	long := exec.Command("sleep", "infinity")
	patience := detached
	detached = 100 * time.Millisecond
	err = beside(long)
	detached = patience
	if long.Process == nil {
		t.Fatal(err)
	}
	if !errors.Is(err, errdefs.ErrUnderWay) {
		t.Errorf("beside a process that keeps the mount: %v", err)
	}
	if err := long.Process.Kill(); err != nil {
		t.Error(err)
	}
	long.Wait()
	if err := short.Wait(); err != nil {
		t.Error(err)
	}
	n.mustDelete(v.ID)
}
