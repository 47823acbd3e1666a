// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package pool

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/csi-disktemplate/csi-disktemplate/internal/failpoint"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/tmpfile"
)

var (
	// ErrUnusable means that the directory cannot be a pool, or no longer is the
	// one that was opened.
	ErrUnusable = errors.New("pool is not usable")
	// ErrFull means that the pool's filesystem has no space left.
	ErrFull = errors.New("pool is full")
)

// Config says where the pool is.
type Config struct {
	// Dir is a directory for this plugin alone. It is made if it does not exist.
	// One that exists must belong to the caller and be writable by nobody else.
	Dir string
	// LoopbackSize, if not 0, lets Open make an xfs of so many bytes in the sparse
	// file Dir/pool.img when Dir itself cannot share extents. A pool.img that
	// exists already is used as it is.
	LoopbackSize int64
}

// Pool is an open pool.
type Pool struct {
	root string
	dir  *os.File // of root: stays the same directory whatever happens to the name
	id   fsID
}

const (
	templatesDir = "templates"
	volumesDir   = "volumes"
	snapshotsDir = "snapshots"
	locksDir     = "locks"
	cacheDir     = "cache"
)

var (
	// imageDirs hold images, which share extents with each other.
	imageDirs = []string{templatesDir, volumesDir, snapshotsDir}
	subdirs   = append([]string{locksDir, cacheDir}, imageDirs...)
)

// Open checks that the directory can be a pool and lays it out.
func Open(ctx context.Context, c Config) (*Pool, error) {
	if c.Dir == "" {
		return nil, fmt.Errorf("%w: no directory given; set --pool to a directory on btrfs or xfs", ErrUnusable)
	}
	dir, err := filepath.Abs(c.Dir)
	if err != nil {
		return nil, err
	}
	// Judged before anything is made, and again afterwards: the probe may have
	// seen the parent of another mount.
	gate := Gate(dir)
	if gate != nil && c.LoopbackSize == 0 {
		return nil, gate
	}
	if err := ownDir(dir); err != nil {
		return nil, err
	}
	if gate == nil {
		gate = tryReflink(dir)
	}
	if gate == nil {
		return layOut(dir)
	}
	if !errors.Is(gate, ErrUnusable) { // it says nothing of what the filesystem can do
		return nil, gate
	}
	if c.LoopbackSize == 0 {
		return nil, gate
	}
	root, err := openLoopback(ctx, dir, c.LoopbackSize)
	if err != nil {
		return nil, fmt.Errorf("loopback pool in %s: %w", dir, err)
	}
	return layOut(root)
}

// OpenExisting opens the pool that Open made in dir before, loopback or not, and
// makes none. A loopback pool that is not mounted is [ErrUnusable].
func OpenExisting(dir string) (*Pool, error) {
	for _, root := range []string{dir, filepath.Join(dir, loopbackMount)} {
		if !isPool(root) {
			continue
		}
		root, err := filepath.EvalSymlinks(root)
		if err != nil {
			return nil, err
		}
		d, err := os.Open(root)
		if err != nil {
			return nil, err
		}
		id, err := statfs(root)
		return &Pool{root: root, dir: d, id: id}, err
	}
	if _, err := os.Stat(filepath.Join(dir, loopbackImage)); err == nil {
		return nil, fmt.Errorf("%w: the loopback pool in %s is not mounted; start the plugin, or `mount -o loop %s %s`",
			ErrUnusable, dir, filepath.Join(dir, loopbackImage), filepath.Join(dir, loopbackMount))
	}
	return nil, fmt.Errorf("%w: there is no pool in %q; give --pool the directory that the plugin was given", ErrUnusable, dir)
}

// isPool reports whether a directory has what layOut makes, as it makes it. A
// pool that an older version laid out has no snapshots yet.
func isPool(root string) bool {
	for _, name := range subdirs {
		if name == snapshotsDir {
			continue
		}
		fi, err := os.Lstat(filepath.Join(root, name))
		if err != nil || fi.Mode() != os.ModeDir|0o700 || int(fi.Sys().(*syscall.Stat_t).Uid) != os.Geteuid() {
			return false
		}
	}
	return true
}

// layOut makes the directories of a pool whose filesystem has passed the gate.
func layOut(root string) (*Pool, error) {
	root, err := filepath.EvalSymlinks(root) // as the kernel has it
	if err != nil {
		return nil, err
	}
	d, err := os.Open(root)
	if err != nil {
		return nil, err
	}
	p := &Pool{root: root, dir: d}
	if p.id, err = statfs(root); err != nil {
		d.Close()
		return nil, err
	}
	for _, name := range subdirs {
		if err := p.subdir(name); err != nil {
			d.Close()
			return nil, err
		}
	}
	if err := p.setNoCOW(); err != nil {
		d.Close()
		return nil, err
	}
	if err := p.tryClone(); errors.Is(err, ErrFull) {
		// A full pool must open: its volumes are to be unpublished.
		klog.ErrorS(err, "The pool has no space for a trial clone")
	} else if err != nil {
		d.Close()
		return nil, err
	}
	return p, nil
}

// subdir makes one of the pool's directories and holds it to the pool's terms.
func (p *Pool) subdir(name string) error {
	path := filepath.Join(p.root, name)
	if err := os.Mkdir(path, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return full(err)
	}
	fi, err := os.Lstat(path)
	if err != nil {
		return err
	}
	if !fi.IsDir() {
		return fmt.Errorf("%w: %s is not a directory (%s); move it away", ErrUnusable, path, fi.Mode().Type())
	}
	if fi.Mode().Perm() != 0o700 {
		if err := os.Chmod(path, 0o700); err != nil {
			return err
		}
	}
	id, err := statfs(path)
	if err != nil {
		return err
	}
	if id != p.id {
		return fmt.Errorf("%w: %s is on another filesystem than %s (%w): a clone cannot cross them; unmount it", ErrUnusable, path, p.root, syscall.EXDEV)
	}
	return nil
}

// ownDir makes dir, or insists that an existing one is ours alone. The mode of
// a directory that somebody else made is not changed: it may be a wrong path.
func ownDir(dir string) error {
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o700); err == nil || !errors.Is(err, os.ErrExist) {
		return err
	}
	fi, err := os.Stat(dir)
	if err != nil {
		return err
	}
	if !fi.IsDir() {
		return fmt.Errorf("%w: %s is not a directory; give --pool another path", ErrUnusable, dir)
	}
	if st := fi.Sys().(*syscall.Stat_t); int(st.Uid) != os.Geteuid() {
		return fmt.Errorf("%w: %s belongs to uid %d, not to %d; chown it or give --pool a directory of its own", ErrUnusable, dir, st.Uid, os.Geteuid())
	}
	if fi.Mode().Perm()&0o022 != 0 {
		return fmt.Errorf("%w: %s has mode %#o: others may write to it; `chmod 0700 %s` or give --pool a directory of its own", ErrUnusable, dir, fi.Mode().Perm(), dir)
	}
	return nil
}

// Root is the pool's directory, on the filesystem that holds the images.
func (p *Pool) Root() string { return p.root }

// Template is the path of the template with the given key.
func (p *Pool) Template(key string) string { return filepath.Join(p.root, templatesDir, key) }

// Volume is the path of the image of the volume with the given name.
func (p *Pool) Volume(name string) string { return filepath.Join(p.root, volumesDir, name) }

// Snapshot is the path of the image of the snapshot with the given name.
func (p *Pool) Snapshot(name string) string { return filepath.Join(p.root, snapshotsDir, name) }

// CacheDir is for what can be made again.
func (p *Pool) CacheDir() string { return filepath.Join(p.root, cacheDir) }

// Templates lists the keys there are, in order.
func (p *Pool) Templates() ([]string, error) { return p.names(templatesDir) }

// Volumes lists the names of the volumes there are, in order.
func (p *Pool) Volumes() ([]string, error) { return p.names(volumesDir) }

// Snapshots lists the names of the snapshots there are, in order.
func (p *Pool) Snapshots() ([]string, error) { return p.names(snapshotsDir) }

func (p *Pool) names(dir string) ([]string, error) {
	names, err := p.list(dir)
	return slices.DeleteFunc(names, func(name string) bool { return strings.HasPrefix(name, ".") }), err // of tmpfile.Replace
}

// list is everything in a directory, in order.
func (p *Pool) list(dir string) ([]string, error) {
	d, err := p.openAt(dir, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	slices.Sort(names)
	return names, err
}

// Replacements lists the names of the volumes beside which there is what
// [tmpfile.Replace] makes for a moment, in order: it is under way, or its process
// died in it.
func (p *Pool) Replacements() ([]string, error) {
	all, err := p.list(volumesDir)
	var names []string
	for _, beside := range all {
		if name, ok := tmpfile.Replaces(beside); ok {
			names = append(names, name)
		}
	}
	return names, err
}

// Replacement is the path of what is to replace the image of a volume.
func (p *Pool) Replacement(name string) string { return tmpfile.Beside(p.Volume(name)) }

// OpenVolume opens a volume's image for reading and writing; where the pool has
// become read-only, for reading. It is the opened pool's, whatever its path leads to
// by now: what was published of it can be unpublished.
func (p *Pool) OpenVolume(name string) (*os.File, error) { return p.openImage(volumesDir, name) }

// OpenSnapshot opens a snapshot likewise.
func (p *Pool) OpenSnapshot(name string) (*os.File, error) { return p.openImage(snapshotsDir, name) }

func (p *Pool) openImage(dir, name string) (*os.File, error) {
	const safe = unix.O_NOFOLLOW | unix.O_NONBLOCK // no link, and no waiting for a FIFO's other end
	f, err := p.openAt(filepath.Join(dir, name), unix.O_RDWR|safe)
	if errors.Is(err, unix.EROFS) {
		f, err = p.openAt(filepath.Join(dir, name), unix.O_RDONLY|safe)
	}
	return f, err
}

func (p *Pool) openAt(name string, flags int) (*os.File, error) {
	fd, err := unix.Openat(int(p.dir.Fd()), name, flags|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "openat", Path: filepath.Join(p.root, name), Err: err}
	}
	return os.NewFile(uintptr(fd), filepath.Join(p.root, name)), nil
}

// RemoveVolume removes a volume's image, likewise of the opened pool. One that does
// not exist is fine.
func (p *Pool) RemoveVolume(name string) error {
	name = filepath.Join(volumesDir, name)
	err := failpoint.Before("unlink")
	if err == nil {
		err = unix.Unlinkat(int(p.dir.Fd()), name, 0)
	}
	if err == nil || err == unix.ENOENT {
		return nil
	}
	err = &os.PathError{Op: "unlinkat", Path: filepath.Join(p.root, name), Err: err}
	if unusable := p.Check(); unusable != nil {
		return fmt.Errorf("%w: %w", unusable, err)
	}
	return err
}

// NewTemplate opens an unnamed file that can become a template. It is gone with
// its descriptor unless it is linked. A pool that does not pass [Pool.Check] takes
// nothing new.
func (p *Pool) NewTemplate() (*os.File, error) { return p.newImage(templatesDir) }

// NewVolume opens an unnamed file that can become a volume, likewise.
func (p *Pool) NewVolume() (*os.File, error) { return p.newImage(volumesDir) }

// NewSnapshot opens an unnamed file that can become a snapshot, likewise.
func (p *Pool) NewSnapshot() (*os.File, error) { return p.newImage(snapshotsDir) }

func (p *Pool) newImage(dir string) (*os.File, error) {
	if err := p.Check(); err != nil {
		return nil, err
	}
	f, err := tmpfile.Create(filepath.Join(p.root, dir), 0o600)
	return f, full(err)
}

// Check reports whether the pool is still the filesystem that was opened, at
// the same path, and writable.
func (p *Pool) Check() error {
	now, err := os.Stat(p.root)
	if err != nil {
		return fmt.Errorf("%w: %w; mount it again and restart the plugin", ErrUnusable, err)
	}
	opened, err := p.dir.Stat()
	if err != nil {
		return fmt.Errorf("%w: %w", ErrUnusable, err)
	}
	if !os.SameFile(now, opened) {
		return fmt.Errorf("%w: %s is no longer the directory it was at start: something was mounted over it or unmounted; undo that or restart the plugin", ErrUnusable, p.root)
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(p.dir.Fd()), &st); err != nil {
		return fmt.Errorf("%w: %s: %w", ErrUnusable, p.root, err)
	}
	if st.Flags&unix.ST_RDONLY != 0 {
		return fmt.Errorf("%w: %s is mounted read-only; see the kernel log for the reason, then remount it", ErrUnusable, p.root)
	}
	return nil
}

// Space is what the pool's filesystem has, in bytes.
type Space struct {
	Total, Available int64
}

// Space asks the filesystem.
func (p *Pool) Space() (Space, error) {
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(p.dir.Fd()), &st); err != nil {
		return Space{}, fmt.Errorf("statfs %s: %w", p.root, err)
	}
	return Space{
		Total:     int64(st.Blocks) * int64(st.Bsize),
		Available: int64(st.Bavail) * int64(st.Bsize),
	}, nil
}

// Sync commits what the pool's filesystem has in hand. On btrfs that also frees
// what was deleted a moment ago; syncfs(2).
func (p *Pool) Sync() error {
	err := failpoint.Before("syncfs")
	if err == nil {
		err = unix.Syncfs(int(p.dir.Fd()))
	}
	if err != nil {
		return fmt.Errorf("syncfs %s: %w", p.root, err)
	}
	return nil
}

// Close lets go of the pool. It stays as it is, mounted if it was.
func (p *Pool) Close() error { return p.dir.Close() }

// Full marks an error as ErrFull where its reason is that the disk is full.
func Full(err error) error { return full(err) }

func full(err error) error {
	if err != nil && !errors.Is(err, ErrFull) && (errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)) {
		return fmt.Errorf("%w: %w; delete volumes, run `csi-disktemplate clean-all` to drop cached templates, or enlarge it", ErrFull, err)
	}
	return err
}
