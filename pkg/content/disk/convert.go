// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package disk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/internal/failpoint"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/cage"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/fsctl"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/sparse"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
)

const (
	// uid and gid belong to no user, and differ from those of QEMU and of e2fsck.
	uid, gid = 65502, 65502
	// block is what a loop device's size is a multiple of, in bytes.
	block = 4096
	// rate is what the slowest disk and the best compression leave, in bytes per second. With it, and some minutes
	// for very small disks, a conversion that takes longer hangs.
	rate = 20 * size.MiB
	// noRoom is less space than any write needs for its metadata, in bytes.
	noRoom = 8 * size.MiB
	// maxOutput bounds what an error repeats of qemu-img's messages, in bytes.
	maxOutput = 500
)

// patience is how long a disk of so many bytes may take. One of 1 TiB has all its bytes rarely, so there is a cap.
func patience(virtual int64) time.Duration {
	return min(10*time.Minute+time.Duration(virtual/rate)*time.Second, 6*time.Hour)
}

// Convert writes the disk in src to dst, which must be empty and open for reading and writing. Blocks of zeros
// become holes. dst gets the size that [Inspect] returns.
//
// A qcow2 must be in a file that nobody else writes to, as [Find] and [Copy] make it, open for reading and writing: it
// may be extended by zeros, to a whole block.
//
// Errors are [ErrUnusable], [ErrFailed] with qemu-img's message, [cage.ErrNoProgram], [pool.ErrFull], or the
// cause of ctx. After an error, dst is to be closed.
func Convert(ctx context.Context, dst, src *os.File, format Format) error {
	found, virtual, err := Inspect(src)
	if err != nil {
		return err
	}
	if found != format {
		return unusable("it is in the format %s, and not %s", found, format)
	}
	if format == Raw {
		err = copyRaw(ctx, dst, src)
	} else {
		err = convertQcow2(ctx, dst, src, virtual)
	}
	if err == nil {
		err = sparse.SetLength(dst, virtual)
	}
	if err != nil {
		return pool.Full(err)
	}
	return read(dst, virtual)
}

// copyRaw copies the data of src, but for zeros.
func copyRaw(ctx context.Context, dst, src *os.File) error {
	for e, err := range sparse.Data(src) {
		if err != nil {
			return err
		}
		if _, err := sparse.Fill(ctx, dst, io.NewSectionReader(src, e.Start, e.End-e.Start), e.Start); err != nil {
			return err
		}
	}
	return nil
}

// Copy writes what r reads to a new unnamed file in a directory of the pool, with holes for zeros.
func Copy(ctx context.Context, dir string, r io.Reader) (*os.File, error) {
	f, err := create(dir)
	if err != nil {
		return nil, err
	}
	n, err := sparse.Fill(ctx, f, r, 0)
	if err == nil {
		err = sparse.SetLength(f, n)
	}
	if err != nil {
		f.Close()
		return nil, pool.Full(err)
	}
	return f, nil
}

// convertQcow2 has qemu-img write to a loop device on dst what it reads from one on src.
func convertQcow2(ctx context.Context, dst, src *os.File, virtual int64) error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("%w: a qcow2 is read by a caged process on a loop device, which only root can make; "+
			"run this as root, or give it as a raw disk: `qemu-img convert -O raw FILE disk.raw`", ErrFailed)
	}
	program, err := cage.FindProgram("qemu-img", "qemu-utils", cage.ProgramDirs)
	if err != nil {
		return err
	}
	from, err := attach(src, loopdev.Options{ReadOnly: true, AutoClear: true})
	if err != nil {
		return err
	}
	defer from.Close()
	if err := sparse.SetLength(dst, virtual); err != nil {
		return err
	}
	to, err := attach(dst, loopdev.Options{AutoClear: true})
	if err != nil {
		return err
	}
	defer to.Close()
	ctx, cancel := context.WithTimeoutCause(ctx, patience(virtual), errTooLong)
	defer cancel()
	tool := &qemuImg{program: program, patience: patience(virtual), devices: []string{from.Path(), to.Path()}}
	if err := tool.check(ctx, from.Path()); err != nil {
		return err
	}
	err = tool.convert(ctx, from.Path(), to.Path())
	// The kernel has only EIO for a device whose file got no space.
	if st, e := fsctl.StatusOf(dst); err != nil && e == nil && st.Available < noRoom {
		return fmt.Errorf("%w: no room for the converted disk; delete volumes, %s, or enlarge the pool",
			pool.ErrFull, pool.DropTemplates())
	}
	return err
}

var errTooLong = errors.New("it took too long")

// attach attaches a file whose length becomes a multiple of a device's block.
func attach(f *os.File, o loopdev.Options) (*loopdev.Device, error) {
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if err := sparse.Extend(f, (fi.Size()+block-1)/block*block); err != nil {
		return nil, err
	}
	return new(loopdev.Allocator).Attach(f, o)
}

// qemuImg is the program, and what it may use.
type qemuImg struct {
	program  string
	patience time.Duration
	devices  []string
}

// leaks is the exit code of qemu-img check for space that is allocated and not used, which is no damage.
const leaks = 3

// check finds clusters that the file does not have. Without it, a truncated disk would be converted with zeros in
// their place. The end of the last cluster may be missing in a good file too.
func (q *qemuImg) check(ctx context.Context, from string) error {
	err := q.run(ctx, "check", "-T", "none", "--image-opts", sourceOptions(from))
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == leaks {
		return nil
	}
	return err
}

// convert copies. The formats are given, so that nothing in a disk is taken for that of another one.
func (q *qemuImg) convert(ctx context.Context, from, to string) error {
	return q.run(ctx, "convert",
		"-n", "--target-is-zero", "-S", "64k", // holes as those of package sparse
		"-T", "none", "-t", "none", // the page cache has the files already
		"--image-opts", sourceOptions(from),
		"--target-image-opts", "driver=raw,file.driver=host_device,file.filename="+to)
}

func sourceOptions(device string) string {
	return "driver=qcow2,file.driver=host_device,file.filename=" + device
}

// run runs a command of qemu-img in a cage with the devices.
func (q *qemuImg) run(ctx context.Context, args ...string) error {
	spec := cage.System()
	spec.UID, spec.GID = uid, gid
	spec.Devices = q.devices
	// Measured (VmPeak, open descriptors) for disks of 670 MiB: 0.7 to 0.9 GiB, and 11 descriptors. Most of that is for
	// the stacks and heaps of threads, so there is one heap, whatever the number of processors.
	spec.Limits = cage.Limits{Memory: 2 << 30, CPU: q.patience, Files: 64}
	cmd := exec.CommandContext(ctx, q.program, args...)
	cmd.Env = []string{"PATH=/usr/bin:/bin", "LC_ALL=C", "MALLOC_ARENA_MAX=1"} // mallopt(3)
	out := &head{}
	cmd.Stdout, cmd.Stderr = out, out
	err := failpoint.Before("execve")
	if err == nil {
		err = cage.Run(cmd, spec)
	}
	switch {
	case err == nil, errors.Is(err, cage.ErrBuild):
		return err
	case ctx.Err() != nil:
		return fmt.Errorf("%w: %w", ErrFailed, context.Cause(ctx))
	case !errors.As(err, new(*exec.ExitError)): // it was not started
		return fmt.Errorf("%w: qemu-img %s: %w", ErrFailed, args[0], err)
	}
	return fmt.Errorf("%w: qemu-img %s: %w: %q; the file is damaged or truncated, see `qemu-img check`",
		ErrFailed, args[0], err, bytes.TrimSpace(out.b))
}

// head keeps the first bytes that are written to it.
type head struct{ b []byte }

func (h *head) Write(b []byte) (int, error) {
	h.b = append(h.b, b[:min(len(b), maxOutput-len(h.b))]...)
	return len(b), nil
}

// read makes sure that both ends of a disk can be read.
func read(f *os.File, virtual int64) error {
	buf := make([]byte, min(size.MiB, virtual))
	for _, at := range []int64{0, virtual - int64(len(buf))} {
		if _, err := f.ReadAt(buf, at); err != nil {
			return fmt.Errorf("%w: reading the converted disk: %w", ErrFailed, err)
		}
	}
	return nil
}
