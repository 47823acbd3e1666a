// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package template

import (
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/singleflight"
	"k8s.io/klog/v2"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/tmpfile"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
)

var (
	// ErrBuilding means that the caller's time ended before the template was
	// ready. The build goes on: asking again joins it.
	ErrBuilding = errors.New("template is still being built")
	// ErrNoFormatter means that the machine cannot format, and no template of the
	// wanted content was left from when it could.
	ErrNoFormatter = errors.New("no template and no way to build one")
	// ErrChanged means that the formatter is not the one that was asked for any
	// more: asking again asks the new one.
	ErrChanged = errors.New("the formatter's files changed meanwhile")
	// ErrTooMany means that templates of so many kinds were built of late that this
	// one has to wait.
	ErrTooMany = errors.New("too many templates were built of late")
)

// DefaultLockTimeout is how long a build waits for another process that holds
// its lock. It is five times what a VM is given, so that a hung build dies
// before those who wait for it give up.
const DefaultLockTimeout = 600 * time.Second

// DefaultMaxBuilds bounds what many different disks, asked for at once, can take
// of a node: a build has a processor and some hundred MiB of memory.
const DefaultMaxBuilds = 2

// DefaultBuildsPerHour bounds what one who asks for a new kind of disk again and again
// takes of a node: at 1.5 to 5 s each, 3 to 10 minutes of one processor in an hour. It is
// far from what is asked for in good faith. A node needs as many as its pods have kinds of
// disks, once, and once more for a new version of the plugin; Kubernetes' storage suite
// has two built for each filesystem, and the 320 ext4 volumes of one run shared those.
const DefaultBuildsPerHour = 120

// Config is what a Store is made of. Pool, Fingerprint and Format are required.
type Config struct {
	Pool *pool.Pool
	// Fingerprint names by content all that decides the bytes of a template.
	Fingerprint func(diskfs.Spec) (string, error)
	// Format makes an empty file into what spec says, verified and durable.
	Format      func(ctx context.Context, f *os.File, spec diskfs.Spec) (Provenance, error)
	LockTimeout time.Duration // 0 is DefaultLockTimeout
	MaxBuilds   int           // builds at the same time; 0 is DefaultMaxBuilds
	// BuildsPerHour is how many builds may begin within any hour; 0 is no limit. Those
	// who find a template, or join a build, are not counted.
	BuildsPerHour int
	// Budget, if not nil, is asked after each build how many bytes of the pool all
	// templates may take: see [Store.Trim].
	Budget func() (int64, error)
	// Trimmed, if not nil, is told of each template that a budget has removed.
	Trimmed func(key string, bytes int64)
	// Observe, if not nil, is told of each build that ended.
	Observe func(spec diskfs.Spec, took time.Duration, err error)
}

// Store has the templates of a pool.
type Store struct {
	cfg    Config
	ctx    context.Context // of builds: canceled by Close
	cancel context.CancelFunc
	builds singleflight.Group
	slots  chan struct{} // has one element for each build under way
	rate   rate

	trimming sync.Mutex // held by the one who removes

	mu       sync.Mutex
	verified map[identity]Record
	touched  map[string]time.Time // when the use of a key was noted last
	holders  map[string]int       // of a key: see hold
}

// NewStore returns a Store of c's pool.
func NewStore(c Config) *Store {
	if c.LockTimeout == 0 {
		c.LockTimeout = DefaultLockTimeout
	}
	if c.MaxBuilds == 0 {
		c.MaxBuilds = DefaultMaxBuilds
	}
	ctx, cancel := context.WithCancel(context.Background())
	return &Store{
		cfg: c, ctx: ctx, cancel: cancel, slots: make(chan struct{}, c.MaxBuilds), rate: rate{most: c.BuildsPerHour, now: time.Now},
		verified: map[identity]Record{}, touched: map[string]time.Time{}, holders: map[string]int{},
	}
}

// Close ends the builds under way and waits until nothing of them is left.
func (s *Store) Close() {
	s.cancel()
	for range cap(s.slots) { // free when a build has ended, and then taken for good
		s.slots <- struct{}{}
	}
}

var keyPattern = regexp.MustCompile(`^[a-z0-9]+-[0-9]+m-[0-9a-f]{16}$`)

// Key names the template of a spec.
func Key(spec diskfs.Spec, fingerprint string) string {
	return fmt.Sprintf("%s-%dm-%s", spec.Filesystem, spec.Size/diskfs.MiB, fingerprint)
}

// Ensure returns the template of spec, building it if there is none. Errors are
// those of spec's validation, [ErrBuilding] when ctx ends first, [ErrNoFormatter],
// [ErrTooMany], [pool.ErrFull], [pool.ErrLocked], or what Format returned.
func (s *Store) Ensure(ctx context.Context, spec diskfs.Spec) (*Template, error) {
	if err := spec.Validate(); err != nil {
		return nil, err
	}
	if fs, err := diskfs.Lookup(spec.Filesystem); err != nil || !fs.Formatted() {
		return nil, fmt.Errorf("%w: filesystem %q has no template: its volumes are sparse files", diskfs.ErrInvalid, spec.Filesystem)
	}
	fp, err := s.cfg.Fingerprint(spec)
	if err != nil {
		return s.newest(spec, err)
	}
	key := Key(spec, fp)
	defer s.hold(key)() // what is waited for is not trimmed
	for tries := 0; ; tries++ {
		// Without the lock: a hit waits for nobody.
		t, err := s.Lookup(key)
		if err == nil {
			t.Hit = tries == 0
			s.touch(key)
			return t, nil
		}
		// Absent right after it was built: a clean-all came between. Once more, then.
		if !errors.Is(err, os.ErrNotExist) && !errors.Is(err, ErrCorrupt) || tries > 1 {
			return nil, err
		}
		err = s.join(ctx, key, spec)
		if errors.Is(err, ErrNoFormatter) {
			return s.newest(spec, err)
		}
		if err != nil {
			return nil, err
		}
	}
}

// join waits for the build of key, starting it if none is under way.
func (s *Store) join(ctx context.Context, key string, spec diskfs.Spec) error {
	start := time.Now()
	done := s.builds.DoChan(key, func() (any, error) {
		err := s.build(key, spec)
		if err != nil { // those who asked may have given up
			klog.ErrorS(err, "Building a template failed", "template", key)
		}
		return nil, err
	})
	select {
	case r := <-done:
		return r.Err
	case <-ctx.Done():
		return fmt.Errorf("%w: %s (%s), waited %s; try again, the build goes on meanwhile, by %s: %w",
			ErrBuilding, key, spec, time.Since(start).Round(time.Millisecond), s.cfg.Pool.LockHolders(key), context.Cause(ctx))
	}
}

// build makes the template of key, unless another process has made it by the
// time its lock is ours.
func (s *Store) build(key string, spec diskfs.Spec) error {
	// Before its lockfile is there: who is refused leaves nothing.
	turn, err := s.rate.take()
	if err != nil {
		if t, err := s.Lookup(key); err == nil { // it was built since the caller looked
			return t.Close()
		}
		return fmt.Errorf("template %s: %w", key, err)
	}
	defer turn.end()
	waiting, cancel := context.WithTimeout(s.ctx, s.cfg.LockTimeout)
	defer cancel()
	lock, err := s.cfg.Pool.Lock(waiting, key)
	if err != nil {
		return err
	}
	defer lock.Unlock()

	old, err := s.Lookup(key)
	switch {
	case err == nil:
		return old.Close()
	case errors.Is(err, ErrCorrupt):
		klog.ErrorS(err, "Rebuilding a corrupt template", "template", key)
	case !errors.Is(err, os.ErrNotExist):
		return err
	}
	select {
	case s.slots <- struct{}{}:
		defer func() { <-s.slots }()
	case <-waiting.Done(): // others must not wait for a lock whose holder only waits
		return fmt.Errorf("%w: %s waited for %d other builds: %w", ErrBuilding, key, cap(s.slots), context.Cause(waiting))
	}
	start := time.Now()
	err = s.format(key, spec, start, turn)
	if s.cfg.Observe != nil {
		s.cfg.Observe(spec, time.Since(start), err)
	}
	if err == nil {
		s.touch(key)
		s.trimAfter(key)
	}
	return err
}

// format builds the template as a file without a name and links it in.
func (s *Store) format(key string, spec diskfs.Spec, start time.Time, turn *turn) error {
	f, err := s.cfg.Pool.NewTemplate()
	if err != nil {
		return err
	}
	defer f.Close()
	klog.InfoS("Building a template", "template", key, "spec", spec.String())
	made, err := s.cfg.Format(s.ctx, f, spec)
	turn.used = !errors.Is(err, ErrNoFormatter) // else there was no VM
	if err != nil {
		return fmt.Errorf("building template %s: %w", key, err)
	}
	if Key(spec, made.Fingerprint) != key {
		return fmt.Errorf("%w: template %s, its fingerprint is %s now; try again", ErrChanged, key, made.Fingerprint)
	}
	r := Record{Version: recordVersion, Key: key, Spec: spec, Provenance: made, Built: start.UTC()}
	if r.Digest, err = digest(f); err != nil {
		return err
	}
	r.BuildMS = time.Since(start).Milliseconds()
	if err := pool.SetRecord(f, pool.TemplateAttr, r); err != nil {
		return err
	}
	if err := f.Chmod(0o400); err != nil { // nobody writes to a template again
		return err
	}
	// What is about to get its name must pass what every later hit must pass.
	if _, err := verify(f, key); err != nil {
		return err
	}
	if err := s.publish(f, key); err != nil {
		return err
	}
	klog.InfoS("Built a template", "template", key, "duration", time.Since(start).Round(time.Millisecond),
		"accelerator", made.Accelerator, "kernel", made.Kernel, "mkfs", made.Mkfs)
	return nil
}

// publish gives a whole template its name, durably. The lock is held and the
// key was looked up under it, so what still stands there is corrupt.
func (s *Store) publish(f *os.File, key string) error {
	path := s.cfg.Pool.Template(key)
	if err := tmpfile.Remove(path); err != nil {
		return fmt.Errorf("%w: %s is in the way of a template: %w; move it away", pool.ErrUnusable, path, err)
	}
	return pool.Full(tmpfile.Publish(f, path))
}

// Lookup opens and verifies the template of a key. It is [os.ErrNotExist] if
// there is none, [ErrCorrupt] if what is there is not that template.
//
// The whole content is read the first time this process meets a file, and again
// only when stat(2) shows that the file changed.
func (s *Store) Lookup(key string) (_ *Template, err error) {
	letGo := s.hold(key)
	defer func() {
		if err != nil {
			letGo()
		}
	}()
	path := s.cfg.Pool.Template(key)
	fi, err := os.Lstat(path)
	if err != nil {
		return nil, err
	}
	if !fi.Mode().IsRegular() { // opening a FIFO would hang
		return nil, fmt.Errorf("template %s: %w: it is not a regular file (%s)", key, ErrCorrupt, fi.Mode().Type())
	}
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	r, err := s.verifyOnce(f, key)
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("template %s: %w", key, err)
	}
	return &Template{File: f, Record: r, letGo: letGo}, nil
}

func (s *Store) verifyOnce(f *os.File, key string) (Record, error) {
	id, err := identify(f)
	if err != nil {
		return Record{}, err
	}
	s.mu.Lock()
	r, known := s.verified[id]
	s.mu.Unlock()
	if known && r.Key == key {
		return r, nil
	}
	if r, err = verify(f, key); err != nil {
		return Record{}, err
	}
	s.mu.Lock()
	s.verified[id] = r
	s.mu.Unlock()
	return r, nil
}

// newest returns the latest template of spec's content, whatever made it: a
// cache that is warm keeps serving when the formatter is gone.
func (s *Store) newest(spec diskfs.Spec, cause error) (*Template, error) {
	keys, err := s.cfg.Pool.Templates()
	if err != nil {
		return nil, err
	}
	var best *Template
	for _, key := range keys {
		if !strings.HasPrefix(key, Key(spec, "")) {
			continue
		}
		t, err := s.Lookup(key)
		if err != nil {
			continue
		}
		if !t.Spec.Equal(spec) || best != nil && t.Built.Before(best.Built) {
			t.Close()
			continue
		}
		if best != nil {
			best.Close()
		}
		best = t
	}
	if best == nil {
		return nil, fmt.Errorf("%w of %s: %w", ErrNoFormatter, spec, cause)
	}
	best.Hit = true
	s.touch(best.Key)
	klog.InfoS("Serving a template that could not be built again", "template", best.Key, "built", best.Built, "cause", cause)
	return best, nil
}

// CleanAll removes every template that nobody is building or replacing, and
// returns how many it removed and how many it left because their lock was held.
// Clones are not touched: they share extents, not names. Lockfiles stay.
func (s *Store) CleanAll() (removed, busy int, err error) {
	keys, err := s.cfg.Pool.Templates()
	if err != nil {
		return 0, 0, err
	}
	var errs []error
	for _, key := range keys {
		if !keyPattern.MatchString(key) {
			continue // nothing of ours
		}
		switch gone, err := s.remove(key, func() bool { return true }); {
		case err != nil:
			errs = append(errs, err)
		case gone:
			removed++
		default:
			busy++
		}
	}
	return removed, busy, errors.Join(errs...)
}

// remove takes a template's name away if nobody holds its lock and, with that in hand,
// it still should go.
func (s *Store) remove(key string, still func() bool) (gone bool, err error) {
	lock, err := s.cfg.Pool.TryLock(key)
	if err != nil || lock == nil {
		return false, err
	}
	defer lock.Unlock()
	if !still() {
		return false, nil
	}
	if err := os.Remove(s.cfg.Pool.Template(key)); err != nil {
		return false, err
	}
	return true, nil
}
