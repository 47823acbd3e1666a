// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/csi-disktemplate/csi-disktemplate/internal/harness"
)

// A way is one way to a mounted filesystem, and back. Only publish and unpublish are timed.
type way interface {
	// prepare makes what is there before in any case, as the directories that kubelet makes.
	prepare(v *volume) error
	publish(ctx context.Context, v *volume) error
	unpublish(ctx context.Context, v *volume) error
	// tidy removes what is left after that.
	tidy(v *volume) error
}

// The ways, as series and tables name them.
const (
	plugin     = "plugin"
	ready      = "ready" // the plugin, when it has kept the volume ready
	floor      = "floor"
	floorUUID  = "floor+uuid"
	habit      = "mkfs"
	otherHabit = "cp --reflink"
	emptyDir   = "emptyDir"
	volatile   = "volatile" // the plugin, asked for a volatile volume
	tmpfs      = "tmpfs"
	claim      = "claim"
	peer       = "peer"
	full       = "full"      // the plugin, asked for a volume that is born with a content
	empty      = "empty"     // the plugin, asked for an empty volume of the same size
	golden     = "golden"    // the plugin, asked for a volume that starts from a golden
	rewritten  = "rewritten" // the same, from a golden of which a part was written again
	committing = "commit"    // the plugin, asked for a volume that starts from a golden and is committed to another one
	tarInLoop  = "tar, loop"
	tarOnDisk  = "tar, disk"
)

// wayNames has all ways, in the order in which tables and plots show them.
var wayNames = []string{plugin, volatile, ready, floor, floorUUID, habit, otherHabit, emptyDir, tmpfs, claim, peer,
	full, golden, rewritten, empty, committing, tarInLoop, tarOnDisk}

// contentWays are compared by what happens inside a volume.
var contentWays = []string{plugin, volatile, emptyDir, tmpfs}

// volume is one volume by any way.
type volume struct {
	fs     string
	size   int64
	id     string
	pod    string // its directory
	target string // where it is mounted
	image  string // its file, of the ways that have one
	loop   int
	device string
	csi    *harness.Volume
}

// overCSI is the plugin, or another driver: the calls that kubelet makes for an inline volume.
type overCSI struct{ client *harness.Client }

func (w overCSI) prepare(v *volume) error                      { return v.csi.MakeDirs() }
func (w overCSI) publish(ctx context.Context, v *volume) error { return w.client.Publish(ctx, v.csi) }
func (w overCSI) unpublish(ctx context.Context, v *volume) error {
	return w.client.Unpublish(ctx, v.csi)
}
func (w overCSI) tidy(v *volume) error { return os.RemoveAll(v.pod) }

// overVolatile is the plugin, asked for volatile volumes.
type overVolatile struct{ overCSI }

func (w overVolatile) prepare(v *volume) error {
	v.csi.Context["durability"] = "volatile"
	return w.overCSI.prepare(v)
}

// overClaims is the plugin, or another driver: the calls of the sidecars and kubelet for a claim, from its creation until a
// pod has it.
type overClaims struct {
	client *harness.Client
	node   harness.Node
}

func (w overClaims) prepare(*volume) error { return nil }

func (w overClaims) publish(ctx context.Context, v *volume) error {
	made, err := w.client.Create(ctx, harness.CreateRequest(v.id, v.size, harness.Mounted(v.fs), nil))
	if err != nil {
		return err
	}
	v.csi = w.node.Claim(made.VolumeId, harness.Mounted(v.fs), v.id)
	v.csi.Context = made.VolumeContext
	if err := v.csi.MakeDirs(); err != nil {
		return err
	}
	if err := w.client.Stage(ctx, v.csi); err != nil {
		return err
	}
	return w.client.Publish(ctx, v.csi)
}

func (w overClaims) unpublish(ctx context.Context, v *volume) error {
	if err := w.client.Unpublish(ctx, v.csi); err != nil {
		return err
	}
	if err := w.client.Unstage(ctx, v.csi); err != nil {
		return err
	}
	return w.client.Delete(ctx, v.csi.ID)
}

func (w overClaims) tidy(v *volume) error {
	return errors.Join(os.RemoveAll(v.pod), os.RemoveAll(filepath.Dir(v.csi.Staging)))
}

// spawned is what the two habits share: an image of its own, and programs that are started one after the other.
type spawned struct {
	// make are the commands that make the image, from a formatted one if they need it.
	make func(v *volume) [][]string
}

// newFilesystem is the habit: mkfs with its defaults, but for 4 KiB sectors, for which direct I/O on a reflinked xfs asks.
func newFilesystem(v *volume) [][]string {
	mkfs := map[string][]string{
		"ext4":  {"mkfs.ext4", "-q", "-F", v.image},
		"xfs":   {"mkfs.xfs", "-q", "-s", "size=4096", v.image},
		"btrfs": {"mkfs.btrfs", "-q", v.image},
	}
	return [][]string{{"truncate", "--size", fmt.Sprint(v.size), v.image}, mkfs[v.fs]}
}

// copyOf is the other habit: a copy of a formatted image, which shares its extents.
func copyOf(templates map[kind]string) func(*volume) [][]string {
	return func(v *volume) [][]string {
		return [][]string{{"cp", "--reflink=always", templates[kind{v.fs, v.size}], v.image}}
	}
}

func (w spawned) prepare(v *volume) error { return os.MkdirAll(v.target, 0o750) }

func (w spawned) publish(ctx context.Context, v *volume) error {
	for _, line := range w.make(v) {
		if _, err := run(ctx, line...); err != nil {
			return err
		}
	}
	out, err := run(ctx, "losetup", "--find", "--show", "--direct-io=on", "--sector-size=4096", v.image)
	if err != nil {
		return err
	}
	v.device = strings.TrimSpace(out)
	_, err = run(ctx, "mount", "-t", v.fs, "-o", strings.Join(append(mountData(v.fs), "rw"), ","), v.device, v.target)
	return err
}

func (w spawned) unpublish(ctx context.Context, v *volume) error {
	for _, line := range [][]string{{"umount", v.target}, {"losetup", "--detach", v.device}, {"rm", v.image}} {
		if _, err := run(ctx, line...); err != nil {
			return err
		}
	}
	return nil
}

func (w spawned) tidy(v *volume) error { return os.RemoveAll(v.pod) }

// run runs a command that ends with this process, and returns its standard output.
func run(ctx context.Context, line ...string) (string, error) {
	cmd := exec.CommandContext(ctx, line[0], line[1:]...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	var errors bytes.Buffer
	cmd.Stderr = &errors
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s: %w\n%s%s", strings.Join(line, " "), err, out, errors.Bytes())
	}
	return string(out), nil
}

// dir is an emptyDir: a directory, which a container runtime then binds to the container's path.
type dir struct{}

func (dir) prepare(v *volume) error { return os.MkdirAll(v.target, 0o750) }

func (dir) publish(_ context.Context, v *volume) error {
	if err := os.Mkdir(v.image, 0o777); err != nil {
		return err
	}
	return os.NewSyscallError("bind", unix.Mount(v.image, v.target, "", unix.MS_BIND, ""))
}

func (dir) unpublish(_ context.Context, v *volume) error {
	return errors.Join(os.NewSyscallError("umount", unix.Unmount(v.target, unix.UMOUNT_NOFOLLOW)), os.RemoveAll(v.image))
}

func (dir) tidy(v *volume) error { return os.RemoveAll(v.pod) }

// inMemory is an emptyDir of the medium Memory: a tmpfs.
type inMemory struct{}

func (inMemory) prepare(v *volume) error { return os.MkdirAll(v.target, 0o750) }

func (inMemory) publish(_ context.Context, v *volume) error {
	return os.NewSyscallError("mount tmpfs", unix.Mount("bench", v.target, "tmpfs", 0, fmt.Sprintf("size=%d", v.size)))
}

func (inMemory) unpublish(_ context.Context, v *volume) error {
	return os.NewSyscallError("umount", unix.Unmount(v.target, unix.UMOUNT_NOFOLLOW))
}

func (inMemory) tidy(v *volume) error { return os.RemoveAll(v.pod) }

// mountData are the filesystem's options with which the plugin mounts a volume, too.
func mountData(fs string) []string {
	if fs == "xfs" {
		return []string{"nouuid"}
	}
	return nil
}

// imagePath is where the ways that are not the plugin have a volume's file.
func imagePath(beside, id string) string { return filepath.Join(beside, id) }
