// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package place

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/lease"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/mount"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/process"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// A disk.img may be in use where it is not published. KubeVirt binds the file of a hotplugged disk from
// the target of a pod that it made for that into the pod of the VM. When the first pod is deleted, its
// target is unpublished, and the VM writes on.

// diskPoll is the time between two looks for the users of a disk.img. A look may read the descriptors of
// all processes, which takes some 10 ms on a busy node.
const diskPoll = 50 * time.Millisecond

// CheckDiskUnused returns [errdefs.ErrState] with the words who has it, if a disk.img is mounted or open
// anywhere, whoever did that and in whatever namespace. It waits a moment for a process that is about to
// end. If only this process has the image open, for a copy of it, the error is [errdefs.ErrUnderWay].
//
// In a container without the node's PID namespace, mounts of other mount namespaces do not show. Whoever
// has the image open is noticed there too: see [lease.Sole].
func (r *Root) CheckDiskUnused(img *image.Image) error {
	for deadline := time.Now().Add(SettleTime); ; time.Sleep(diskPoll) {
		err := checkDiskUnused(img)
		if err == nil || time.Now().After(deadline) {
			return err
		}
	}
}

func checkDiskUnused(img *image.Image) error {
	binds, err := mount.BindsOf(img.File)
	// If the pool is mounted nowhere any more, no mount can be told to be the image's.
	if err != nil && !errors.Is(err, mount.ErrNotMounted) {
		return err
	}
	if len(binds) > 0 {
		return inUse(img, "is mounted at "+describeBind(binds[0]))
	}
	sole := lease.Sole(img.File)
	if sole == nil {
		return nil
	}
	fi, err := img.File.Stat()
	if err != nil {
		return err
	}
	holders, err := process.Holding(fi)
	if err != nil {
		return err
	}
	own := len(holders[os.Getpid()])
	delete(holders, os.Getpid())
	switch {
	case len(holders) > 0:
		return inUse(img, "is open in "+describeProcess(slices.Min(slices.Collect(maps.Keys(holders)))))
	case !errors.Is(sole, lease.ErrOpen): // the kernel does not tell, and nobody is seen
		return nil
	case own > 1:
		return fmt.Errorf("%w: the plugin has the disk.img of volume %s open for another operation, such as a snapshot; try again", errdefs.ErrUnderWay, img.ID())
	}
	return inUse(img, "is open in a process that /proc does not show here, probably of another container")
}

func inUse(img *image.Image, how string) error {
	return fmt.Errorf("%w: volume %s is in use, though no pod has it by its claim: its disk.img %s. A VM may be writing to it: "+
		"unplug the disk, or stop the VM; if nobody uses it, unmount it there", errdefs.ErrState, img.ID(), how)
}

func describeBind(b mount.Bind) string {
	if b.PID == 0 {
		return b.Mountpoint
	}
	return fmt.Sprintf("%s in the mount namespace of %s", b.Mountpoint, describeProcess(b.PID))
}

// describeProcess names a process by its number and its program.
func describeProcess(pid int) string {
	program := "ended"
	if args := process.Arguments(pid); len(args) > 0 {
		program, _, _ = strings.Cut(args[0], " ")
	}
	return fmt.Sprintf("process %d (%s)", pid, program)
}
