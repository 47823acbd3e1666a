// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package growfs grows a filesystem that is not mounted, with the filesystem's own tools.
//
// It is for ext4 on nodes where the kernel does not let the plugin grow it while it is mounted
// (fsctl.MayGrow). The tools parse data that a pod has written. So they run in a cage, as an
// unprivileged user, within limits, and see one block device.
//
// Caveats: Grow starts two processes. That takes 20 ms for a GiB and minutes for some TiB; a
// volume that has its size already never comes here. A grow that was killed halfway may leave a
// filesystem that only `e2fsck -y` could repair (3 to 6 of 60 timed kills), so grow a copy.
//
// Sources: e2fsck(8), resize2fs(8).
package growfs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/cage"
)

// ErrFailed means that a tool refused the filesystem.
var ErrFailed = errors.New("growing the filesystem failed")

const (
	// uid and gid belong to no user, and differ from those of the formatting VM.
	uid, gid = 65501, 65501
)

// limits leave plenty of room. e2fsck takes 46 MiB of memory and 10 s for an empty ext4 of 4 TiB, and
// more for a full one. resize2fs to 8 TiB takes 13 MiB and 35 s.
var limits = cage.Limits{Memory: 2 << 30, CPU: time.Hour, Files: 64}

// Grow makes the filesystem on a block device as large as the device. It must not be mounted. Errors
// are [cage.ErrNoProgram] or [ErrFailed], which includes the tool's output or the cause of ctx.
func Grow(ctx context.Context, fs *diskfs.Filesystem, device string) error {
	checker, err := cage.FindProgram(fs.Checker, fs.Package, cage.ProgramDirs)
	if err != nil {
		return err
	}
	grower, err := cage.FindProgram(fs.Grower, fs.Package, cage.ProgramDirs)
	if err != nil {
		return err
	}
	if err := run(ctx, device, corrected, checker, fs.RepairArgs(device)...); err != nil {
		return err
	}
	return run(ctx, device, 0, grower, fs.GrowArgs(device)...)
}

// corrected is the exit code of fsck(8) for "Filesystem errors corrected".
const corrected = 1

// run runs a tool to its end. maxCode is the largest exit code that counts as success.
func run(ctx context.Context, device string, maxCode int, program string, args ...string) error {
	spec := cage.System()
	spec.UID, spec.GID = uid, gid
	spec.Devices = []string{device}
	spec.Limits = limits
	// Nothing is mounted in the cage, but e2fsprogs fail without this file.
	spec.Files["/etc/mtab"] = nil
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C"}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cage.Run(cmd, spec)
	var exit *exec.ExitError
	switch {
	case err == nil, errors.As(err, &exit) && exit.ExitCode() >= 0 && exit.ExitCode() <= maxCode:
		return nil
	case ctx.Err() != nil:
		return fmt.Errorf("%w: %s: %w", ErrFailed, filepath.Base(program), context.Cause(ctx))
	}
	return fmt.Errorf("%w: %s: %w: %s", ErrFailed, filepath.Base(program), err, bytes.TrimSpace(out.Bytes()))
}
