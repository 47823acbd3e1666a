// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package place

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/health"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/mount"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/logs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// Root is kubelet's directory, below which volumes are staged and published. Nothing outside
// of it is ever mounted or unmounted. A path relative to it is called rel here.
type Root struct {
	path     string // as the container orchestrator spells it
	resolved string // as the mount table spells it
	dir      *os.File
}

// Open opens the directory.
func Open(path string) (*Root, error) {
	if path == "" { // filepath.Abs would make it the current directory
		return nil, errors.New("--kubelet-dir \"\": must be kubelet's root directory")
	}
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	dir, err := os.OpenFile(path, os.O_RDONLY|syscall.O_DIRECTORY, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil, health.Advise(fmt.Errorf("--kubelet-dir %q: the directory does not exist", path), "give kubelet's root directory, or, where no kubelet runs, make one: mkdir -p "+path)
	}
	if err != nil {
		return nil, health.Advise(fmt.Errorf("--kubelet-dir %q: %w", path, err), "give kubelet's root directory")
	}
	resolved, err := filepath.EvalSymlinks(path)
	if err != nil {
		dir.Close()
		return nil, err
	}
	return &Root{path: path, resolved: resolved, dir: dir}, nil
}

// Close closes the directory.
func (r *Root) Close() error { return r.dir.Close() }

// Rel returns a target's path below the root, or [errdefs.ErrInvalid] for a path that does
// not lie there.
func (r *Root) Rel(target string) (string, error) {
	if strings.ContainsRune(target, 0) {
		return "", fmt.Errorf("%w: target path %q: must not contain NUL", errdefs.ErrInvalid, target)
	}
	if !filepath.IsAbs(target) || filepath.Clean(target) != strings.TrimSuffix(target, "/") {
		return "", fmt.Errorf("%w: target path %q: must be absolute, without '.' or '..'", errdefs.ErrInvalid, target)
	}
	rel, err := filepath.Rel(r.path, target)
	if err != nil || rel == "." || rel == ".." || strings.HasPrefix(rel, "../") {
		return "", fmt.Errorf("%w: target path %q: must lie below %s (see --kubelet-dir)", errdefs.ErrInvalid, target, r.path)
	}
	return rel, nil
}

// Path is the opposite of [Root.Rel].
func (r *Root) Path(rel string) string { return filepath.Join(r.path, rel) }

// AsMounted is a target's path as the mount table spells it.
func (r *Root) AsMounted(target string) string {
	rel, err := r.Rel(target)
	if err != nil {
		return target
	}
	return r.mountpoint(rel)
}

// RelMounted is the part below the root of a path that the mount table spells.
func (r *Root) RelMounted(at string) (string, error) { return filepath.Rel(r.resolved, at) }

// Below is [Root.RelMounted] for a path that may be outside of the root.
func (r *Root) Below(at string) (rel string, below bool) {
	return strings.CutPrefix(at, r.resolved+"/")
}

func (r *Root) mountpoint(rel string) string { return filepath.Join(r.resolved, rel) }

// Spot is what is at a target path.
type Spot struct {
	Exists  bool // a directory, or for a block volume a file
	Mounted bool // it is the root of a mount
}

// Inspect looks at a target, which must be a directory or, for a block volume, a file. A path
// that cannot become such a target returns [errdefs.ErrInvalid].
func (r *Root) Inspect(rel string, mode image.Mode) (Spot, error) {
	parent, err := mount.OpenTarget(r.dir, filepath.Dir(rel), syscall.O_DIRECTORY)
	if isPathError(err) {
		return Spot{}, fmt.Errorf("%w: the target path's parent directory must exist, without symbolic links: %w", errdefs.ErrInvalid, err)
	}
	if err != nil {
		return Spot{}, err
	}
	parent.Close()
	kind, flags := "directory", syscall.O_DIRECTORY
	if mode == image.ModeBlock {
		kind, flags = "file", 0
	}
	target, err := mount.OpenTarget(r.dir, rel, flags)
	if errors.Is(err, os.ErrNotExist) {
		return Spot{}, nil
	}
	if isPathError(err) {
		return Spot{}, fmt.Errorf("%w: the target path must be a %s, or not exist yet: %w", errdefs.ErrInvalid, kind, err)
	}
	if err != nil {
		return Spot{}, err
	}
	defer target.Close()
	mounted, err := isMounted(target)
	if err != nil {
		return Spot{}, err
	}
	if mode == image.ModeBlock && !mounted {
		if fi, err := target.Stat(); err != nil || !fi.Mode().IsRegular() {
			return Spot{}, fmt.Errorf("%w: the target path of a block volume must be a file, or not exist yet: %s is of another type (%w)", errdefs.ErrInvalid, target.Name(), syscall.EISDIR)
		}
	}
	return Spot{Exists: true, Mounted: mounted}, nil
}

func isMounted(target *os.File) (bool, error) {
	mounted, err := mount.IsMountPoint(target)
	if errors.Is(err, syscall.EIO) {
		// A filesystem that has shut down does not answer, but the mount table does.
		var info *mount.Info
		info, err = mount.Of(target)
		mounted = info != nil
	}
	return mounted, err
}

// isPathError reports whether an error comes from the path, and not from the machine.
func isPathError(err error) bool {
	for _, fault := range []error{os.ErrNotExist, mount.ErrSymlink, mount.ErrEscapes, syscall.ENOTDIR, syscall.ENAMETOOLONG, syscall.EINVAL} {
		if errors.Is(err, fault) {
			return true
		}
	}
	return false
}

// Make makes the target if it does not exist, and opens it to mount on. If something was
// mounted there since it was inspected, Make returns [errdefs.ErrExists]: building a
// template may have taken a while. undo removes what was made. It is nil if nothing was.
func (r *Root) Make(rel string, mode image.Mode, at Spot) (target *os.File, undo func() error, err error) {
	if mode == image.ModeBlock {
		target, err = mount.MkfileTarget(r.dir, rel, 0o600)
	} else {
		target, err = mount.MkdirTarget(r.dir, rel, 0o750)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("target path %q: %w", r.Path(rel), err)
	}
	if !at.Exists {
		undo = func() error { return r.remove(rel, mode) }
	}
	mounted, err := mount.IsMountPoint(target)
	if err == nil && mounted {
		err = fmt.Errorf("%w: something else was mounted at target path %q meanwhile; unpublish or unmount it first", errdefs.ErrExists, r.Path(rel))
	}
	if err != nil {
		target.Close()
		return nil, undo, err
	}
	return target, undo, nil
}

// remove removes the empty directory or file that a publish or kubelet made.
func (r *Root) remove(rel string, mode image.Mode) error {
	if mode == image.ModeBlock {
		return mount.RmfileTarget(r.dir, rel)
	}
	return mount.RmdirTarget(r.dir, rel)
}

// Clean removes a target that is no longer used. One that stays behind does no harm.
func (r *Root) Clean(rel string, mode image.Mode) {
	if err := r.remove(rel, mode); err != nil && !errors.Is(err, os.ErrNotExist) {
		logs.Warn("Cannot remove a target path; it stays behind", "err", err, "path", r.Path(rel))
	}
}

// OpenDir opens a directory to mount on.
func (r *Root) OpenDir(rel string) (*os.File, error) {
	return mount.OpenTarget(r.dir, rel, syscall.O_DIRECTORY)
}

// OpenMounted opens the root of the mount at a path. If it was unmounted meanwhile, it
// returns [errdefs.ErrState], and does not open the directory below.
func (r *Root) OpenMounted(rel string) (*os.File, error) {
	root, err := r.OpenDir(rel)
	if err != nil {
		return nil, err
	}
	mounted, err := isMounted(root)
	if err == nil && !mounted {
		err = fmt.Errorf("%w: %q was unmounted meanwhile; try again", errdefs.ErrState, root.Name())
	}
	if err != nil {
		root.Close()
		return nil, err
	}
	return root, nil
}
