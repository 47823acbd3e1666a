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

	"github.com/csi-disktemplate/csi-disktemplate/pkg/health"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/fsctl"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/openat"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/tmpfile"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/logs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
)

var (
	// ErrUnusable means that the directory cannot be a pool, or that it is no longer the
	// pool that was opened.
	ErrUnusable = errors.New("pool is not usable")
	// ErrFull means that the pool's filesystem has no space left.
	ErrFull = errors.New("pool is full")
)

// Config says where the pool is.
type Config struct {
	// Dir is a directory for this plugin alone. It is made if it does not exist.
	// An existing directory must belong to the caller and be writable by nobody else.
	Dir string
	// LoopbackSize, if not 0, makes the pool an xfs of this size, in bytes, in the sparse file
	// Dir/pool.img. A smaller one that exists already grows, and a larger one stays as it is.
	// A pool that was made in Dir without a file stays where it is.
	LoopbackSize int64
	// NodeDir is a directory of the node's own filesystem: kubelet's. What the pool shares with
	// it, new volumes leave free in part: NodeHeadroom, of the size of that filesystem.
	NodeDir      string
	NodeHeadroom size.Share
}

// Pool is an open pool.
type Pool struct {
	root string
	dir  *os.File // root itself: it stays the same directory whatever happens to its path
	id   fsctl.Identity

	layers       layers
	nodeHeadroom size.Share

	ofUser bool // it may belong to any user: see OpenCache
}

const (
	templatesDir = "templates"
	volumesDir   = "volumes"
	snapshotsDir = "snapshots"
	goldensDir   = "goldens"
	commitsDir   = "commits"
	locksDir     = "locks"
	cacheDir     = "cache"
)

var (
	// imageDirs hold the images, which share extents with each other.
	imageDirs = []string{templatesDir, volumesDir, snapshotsDir, goldensDir, commitsDir}
	subdirs   = append([]string{locksDir, cacheDir}, imageDirs...)
	laterDirs = []string{snapshotsDir, goldensDir, commitsDir} // not in pools of the first version
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
	if c.LoopbackSize > 0 && !hasImages(dir) {
		if err := ownDir(dir); err != nil {
			return nil, err
		}
		root, err := openLoopback(ctx, dir, c.LoopbackSize)
		if err != nil {
			return nil, fmt.Errorf("loopback pool in %s: %w", dir, err)
		}
		if err := tryVolume(root); err != nil {
			return nil, err
		}
		return layOut(root, c)
	}
	// The type is judged before anything is made. The trial volume follows when dir
	// exists: until then the type may be that of the parent of another mount.
	if err := gate(dir); err != nil {
		return nil, err
	}
	if err := ownDir(dir); err != nil {
		return nil, err
	}
	if err := tryVolume(dir); err != nil {
		return nil, err
	}
	if c.LoopbackSize > 0 {
		logs.Warn("This pool was made without a file, so its size is that of its filesystem; move the directory away to get one of the size that --loopback-pool-size says", "pool", dir)
	}
	return layOut(dir, c)
}

// hasImages reports whether a directory is a pool without a file, or was one: a new loopback
// pool would hide its volumes.
func hasImages(dir string) bool {
	_, err := os.Lstat(filepath.Join(dir, volumesDir))
	return err == nil
}

// openRoot opens a pool's directory under the path that the kernel has for it, without
// symbolic links.
func openRoot(path string, c Config) (*Pool, error) {
	root, err := filepath.EvalSymlinks(path)
	if err != nil {
		return nil, err
	}
	dir, err := os.Open(root)
	if err != nil {
		return nil, err
	}
	st, err := fsctl.StatusOf(dir)
	var found layers
	if err == nil {
		found, err = findLayers(dir, c.NodeDir)
	}
	if err != nil {
		dir.Close()
		return nil, err
	}
	return &Pool{root: root, dir: dir, id: st.Identity, layers: found, nodeHeadroom: c.NodeHeadroom}, nil
}

// layOut opens the directory of a pool, whose filesystem gate has accepted, and makes
// what is missing in it.
func layOut(path string, c Config) (*Pool, error) {
	p, err := openRoot(path, c)
	if err != nil {
		return nil, err
	}
	if err := p.furnish(); err != nil {
		p.Close()
		return nil, err
	}
	return p, nil
}

func (p *Pool) furnish() error {
	for _, name := range subdirs {
		if err := p.subdir(name); err != nil {
			return err
		}
	}
	if err := p.setNoCOW(); err != nil {
		return err
	}
	err := p.tryClone()
	if errors.Is(err, ErrFull) {
		// A full pool must open: its volumes have to be unpublished.
		logs.Warn("The pool has no space for a trial clone", "err", err)
		return nil
	}
	return err
}

// subdir makes one of the pool's directories. One that exists must be a directory on the
// pool's filesystem, and gets the mode 0700.
func (p *Pool) subdir(name string) error {
	path := filepath.Join(p.root, name)
	if err := os.Mkdir(path, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return Full(err)
	}
	fi, err := os.Lstat(path)
	if err != nil {
		return err
	}
	if !fi.IsDir() {
		return fmt.Errorf("%w: %s is not a directory; move it away", ErrUnusable, path)
	}
	if fi.Mode().Perm() != 0o700 {
		if err := os.Chmod(path, 0o700); err != nil {
			return err
		}
	}
	st, err := fsctl.StatusAt(path)
	if err != nil {
		return err
	}
	if st.Identity != p.id {
		return fmt.Errorf("%w: %s is on another filesystem than %s (%w): a clone cannot cross them; unmount it", ErrUnusable, path, p.root, syscall.EXDEV)
	}
	return nil
}

// ownDir makes dir. If dir exists, it must belong to this user, and nobody else may write
// to it. Its mode is not changed: the path may be a mistake.
func ownDir(dir string) error {
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o700); err == nil || !errors.Is(err, os.ErrExist) {
		return err
	}
	return checkOwner(dir)
}

// checkOwner checks the owner and mode of a directory that is to be a pool.
func checkOwner(dir string) error {
	fi, err := os.Stat(dir)
	if err != nil {
		return err
	}
	if !fi.IsDir() {
		return health.Advise(fmt.Errorf("%w: %s is not a directory", ErrUnusable, dir), "choose another path")
	}
	if st := fi.Sys().(*syscall.Stat_t); int(st.Uid) != os.Geteuid() {
		return health.Advise(fmt.Errorf("%w: %s belongs to uid %d, not to %d", ErrUnusable, dir, st.Uid, os.Geteuid()), "chown it or choose a directory for this alone")
	}
	if fi.Mode().Perm()&0o022 != 0 {
		return health.Advise(fmt.Errorf("%w: %s has mode %#o, so others may write to it", ErrUnusable, dir, fi.Mode().Perm()),
			fmt.Sprintf("`chmod 0700 %s` or choose another directory", dir))
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

// Golden is the path of the image of a golden's generation with the given name.
func (p *Pool) Golden(name string) string { return filepath.Join(p.root, goldensDir, name) }

// Commit is the path of the image of a volume that is gone, and is to become a generation of a golden.
func (p *Pool) Commit(name string) string { return filepath.Join(p.root, commitsDir, name) }

// CacheDir is the directory for files that can be made again.
func (p *Pool) CacheDir() string { return filepath.Join(p.root, cacheDir) }

// Templates lists the keys of the templates, in order.
func (p *Pool) Templates() ([]string, error) { return p.names(templatesDir) }

// Volumes lists the names of the volumes, in order.
func (p *Pool) Volumes() ([]string, error) { return p.names(volumesDir) }

// Snapshots lists the names of the snapshots, in order.
func (p *Pool) Snapshots() ([]string, error) { return p.names(snapshotsDir) }

// Goldens lists the names of the generations of all goldens, in order.
func (p *Pool) Goldens() ([]string, error) { return p.names(goldensDir) }

// GoldensChanged looks at the directory of goldens: its status change time moves whenever a generation
// gets its name or loses it.
func (p *Pool) GoldensChanged() (openat.Status, error) { return openat.Stat(p.dir, goldensDir) }

// Commits lists, in order, the names of the volumes that are to become generations of goldens.
func (p *Pool) Commits() ([]string, error) { return p.names(commitsDir) }

func (p *Pool) names(dir string) ([]string, error) {
	names, err := p.list(dir)
	return slices.DeleteFunc(names, func(name string) bool { return strings.HasPrefix(name, ".") }), err // those of tmpfile.Replace
}

// list returns all names in a directory, in order.
func (p *Pool) list(dir string) ([]string, error) {
	d, err := openat.Open(p.dir, dir, syscall.O_RDONLY|syscall.O_DIRECTORY)
	if errors.Is(err, os.ErrNotExist) && slices.Contains(laterDirs, dir) { // a command has opened an older pool
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	slices.Sort(names)
	return names, err
}

// Replacements lists, in order, the names of the volumes that have a file of
// [tmpfile.Replace] beside them. Either the replacement is under way, or its process
// died during it.
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

// Replacement is the path of the file that is to replace the image of a volume.
func (p *Pool) Replacement(name string) string { return tmpfile.Beside(p.Volume(name)) }

// OpenVolume opens a volume's image for reading and writing, or for reading if the pool
// has become read-only. It looks in the directory that was opened as the pool, whatever
// the pool's path leads to by now, so that a published volume can always be unpublished.
func (p *Pool) OpenVolume(name string) (*os.File, error) { return p.openImage(volumesDir, name) }

// OpenSnapshot opens a snapshot's image in the same way as [Pool.OpenVolume].
func (p *Pool) OpenSnapshot(name string) (*os.File, error) { return p.openImage(snapshotsDir, name) }

// OpenGolden opens the image of a golden's generation for reading. It looks for it where [Pool.OpenVolume] does.
func (p *Pool) OpenGolden(name string) (*os.File, error) {
	return openat.Open(p.dir, filepath.Join(goldensDir, name), syscall.O_RDONLY|safely)
}

// OpenCommit opens the image of a volume that is to become a golden in the same way as [Pool.OpenVolume].
func (p *Pool) OpenCommit(name string) (*os.File, error) { return p.openImage(commitsDir, name) }

// safely opens a file that may be anything: it follows no link, and does not wait for the other end of a FIFO.
const safely = syscall.O_NOFOLLOW | syscall.O_NONBLOCK

func (p *Pool) openImage(dir, name string) (*os.File, error) {
	name = filepath.Join(dir, name)
	f, err := openat.Open(p.dir, name, syscall.O_RDWR|safely)
	if errors.Is(err, syscall.EROFS) {
		f, err = openat.Open(p.dir, name, syscall.O_RDONLY|safely)
	}
	return f, err
}

// StatVolume looks at the image of a volume, without opening it, in the directory that was
// opened as the pool.
func (p *Pool) StatVolume(name string) (openat.Status, error) {
	return openat.Stat(p.dir, filepath.Join(volumesDir, name))
}

// StatSnapshot is [Pool.StatVolume] for a snapshot.
func (p *Pool) StatSnapshot(name string) (openat.Status, error) {
	return openat.Stat(p.dir, filepath.Join(snapshotsDir, name))
}

// StatTemplate is [Pool.StatVolume] for a template.
func (p *Pool) StatTemplate(key string) (openat.Status, error) {
	return openat.Stat(p.dir, filepath.Join(templatesDir, key))
}

// StatGolden is [Pool.StatVolume] for a golden's generation.
func (p *Pool) StatGolden(name string) (openat.Status, error) {
	return openat.Stat(p.dir, filepath.Join(goldensDir, name))
}

// StatCommit is [Pool.StatVolume] for a volume that is to become a golden.
func (p *Pool) StatCommit(name string) (openat.Status, error) {
	return openat.Stat(p.dir, filepath.Join(commitsDir, name))
}

// KeepVolume moves the image of a volume among those that are to become goldens, in one step. From there on the
// volume is gone.
func (p *Pool) KeepVolume(name string) error {
	return openat.Rename(p.dir, filepath.Join(volumesDir, name), filepath.Join(commitsDir, name))
}

// RemoveCommit makes sure that there is no image of that name among those that are to become goldens.
func (p *Pool) RemoveCommit(name string) error {
	return openat.Remove(p.dir, filepath.Join(commitsDir, name))
}

// RemoveGolden makes sure that a golden's generation has no image. Whoever has it open keeps it.
func (p *Pool) RemoveGolden(name string) error {
	return openat.Remove(p.dir, filepath.Join(goldensDir, name))
}

// RemoveVolume makes sure that there is no image of a volume, in the directory that was
// opened as the pool.
func (p *Pool) RemoveVolume(name string) error {
	bound := p.boundOf(name)
	err := openat.Remove(p.dir, filepath.Join(volumesDir, name))
	if err == nil {
		p.unbound(bound)
		return nil
	}
	if unusable := p.Check(); unusable != nil {
		return fmt.Errorf("%w: %w", unusable, err)
	}
	return err
}

// NewTemplate opens an unnamed file that can become a template. The file is gone when
// its descriptor is closed, unless it was linked. A pool that fails [Pool.Check] takes
// nothing new.
func (p *Pool) NewTemplate() (*os.File, error) { return p.newImage(templatesDir) }

// NewVolume is [Pool.NewTemplate] for a volume.
func (p *Pool) NewVolume() (*os.File, error) { return p.newImage(volumesDir) }

// NewSnapshot is [Pool.NewTemplate] for a snapshot.
func (p *Pool) NewSnapshot() (*os.File, error) { return p.newImage(snapshotsDir) }

// NewGolden is [Pool.NewTemplate] for a golden's generation.
func (p *Pool) NewGolden() (*os.File, error) { return p.newImage(goldensDir) }

func (p *Pool) newImage(dir string) (*os.File, error) {
	if err := p.Check(); err != nil {
		return nil, err
	}
	f, err := tmpfile.Create(filepath.Join(p.root, dir), 0o600)
	return f, Full(err)
}

// Check reports whether the pool is still the directory that was opened, at the
// same path, and writable.
func (p *Pool) Check() error {
	now, err := os.Stat(p.root)
	if err != nil {
		return health.Advise(fmt.Errorf("%w: %w", ErrUnusable, err), "mount it again and restart the plugin")
	}
	opened, err := p.dir.Stat()
	if err != nil {
		return fmt.Errorf("%w: %w", ErrUnusable, err)
	}
	if !os.SameFile(now, opened) {
		err := fmt.Errorf("%w: %s is no longer the directory it was at start: something was mounted over it or unmounted", ErrUnusable, p.root)
		return health.Advise(err, "undo that or restart the plugin")
	}
	st, err := fsctl.StatusOf(p.dir)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrUnusable, err)
	}
	if st.ReadOnly {
		return health.Advise(fmt.Errorf("%w: %s is mounted read-only", ErrUnusable, p.root), "see the kernel log for the reason, then remount it")
	}
	return nil
}

// Conditions reports what [Pool.Check] finds.
func (p *Pool) Conditions() []health.Condition {
	return unusable(health.PoolUnusable, p.Check())
}

// Sync is [fsctl.Sync] of the pool's filesystem.
func (p *Pool) Sync() error { return fsctl.Sync(p.dir) }

// Unused is the space that the pool takes of the layer below and does not use, in bytes. It is
// 0 if there is no such layer, or if somebody has given the pool all of its space: that is kept.
func (p *Pool) Unused() (int64, error) {
	if len(p.layers.files) == 0 || p.layers.filled {
		return 0, nil
	}
	st, err := fsctl.StatusOf(p.dir)
	if err != nil {
		return 0, err
	}
	_, allocated, err := measure(p.layers.files[0])
	return allocated - st.Used, err
}

// Trim returns the space that [Pool.Unused] counts. It returns [errors.ErrUnsupported] if the
// layer below cannot take it.
func (p *Pool) Trim() error {
	if len(p.layers.files) == 0 || p.layers.filled {
		return nil
	}
	return fsctl.Trim(p.dir, fsctl.Everything, 0)
}

// noRoom is less space than a volume needs to be attached, mounted or grown, in bytes.
const noRoom = 8 * size.MiB

// FullIfNoRoom adds [ErrFull] to an error if its reason is, or may be, that the pool or a layer
// below it is full: for a device that could not be written to, the kernel has no other error
// than EIO.
func (p *Pool) FullIfNoRoom(err error) error {
	if err == nil || !errors.Is(err, syscall.EIO) {
		return Full(err)
	}
	if s, e := p.Space(); e != nil || s.Available >= noRoom {
		return err
	}
	return fmt.Errorf("%w: %w; make room in the pool, and below it", ErrFull, err)
}

// Close closes the pool's descriptors. A loopback pool stays mounted.
func (p *Pool) Close() error {
	p.layers.close()
	return p.dir.Close()
}

// Full adds [ErrFull] to an error whose reason is that the disk is full.
func Full(err error) error {
	if err != nil && !errors.Is(err, ErrFull) && (errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)) {
		return fmt.Errorf("%w: %w; %s", ErrFull, err, remedy())
	}
	return err
}
