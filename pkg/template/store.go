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
	"github.com/csi-disktemplate/csi-disktemplate/pkg/logs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
)

var (
	// ErrBuilding means that the caller's time ended, or nearly, before the template was
	// ready. The build goes on, and the next call joins it.
	ErrBuilding = errors.New("template is still being built")
	// ErrNoFormatter means that the machine cannot format, and that the pool has no earlier
	// template of the wanted content. See [NoFormatter].
	ErrNoFormatter = errors.New("this node cannot make a template")
	// ErrChanged means that the formatter's files were replaced during the call. The next
	// call uses the new ones.
	ErrChanged = errors.New("the formatter's files changed meanwhile")
	// ErrTooMany means that so many templates were built lately that this one has to wait.
	ErrTooMany = errors.New("too many templates were built lately")
	// ErrNoContent means that the content of a template cannot be had: it is unknown, or damaged, or
	// where it comes from does not answer. See [NoContent].
	ErrNoContent = errors.New("the content is not available")
	// ErrUnresolved means that it is not known yet what a content is at the moment. [Config].Resolve
	// finds out.
	ErrUnresolved = errors.New("the content is not resolved yet")
	// ErrNoRoom means that the templates that are retained take all of [Config].Budget. See
	// [Store.Retain].
	ErrNoRoom = errors.New("no room for another template")
)

// NoFormatter makes an error of [Config].Format an [ErrNoFormatter]: the machine lacks what err
// names, and no VM was started. Its text stays that of err. Only [Store.Ensure] can say that
// there is no template either.
func NoFormatter(err error) error { return noFormatter{err} }

type noFormatter struct{ error }

func (e noFormatter) Unwrap() []error { return []error{ErrNoFormatter, e.error} }

// NoContent makes an error of [Config].Format or Fingerprint an [ErrNoContent]. Its text stays that of err.
func NoContent(err error) error { return noContent{err} }

type noContent struct{ error }

func (e noContent) Unwrap() []error { return []error{ErrNoContent, e.error} }

// defaultLockTimeout is how long a build waits for another process that holds its lock. It is
// six times the time limit of a VM, so that a hung build ends before the waiting ones give up.
const defaultLockTimeout = 600 * time.Second

// DefaultMaxBuilds is for a formatter that does not bound its own load.
const DefaultMaxBuilds = 2

// DefaultBuildsPerHour bounds the load on a node when somebody asks for new kinds of disks
// again and again: at 0.5 to 5 s a build, 1 to 10 minutes of one processor in an hour, and twice
// that in the first hour.
//
// Honest use stays far below it. A node builds one template for each kind of disk that its
// pods have, and again after its formatter changes. Kubernetes' storage suite has two
// templates built for each filesystem; the 320 ext4 volumes of one run shared theirs.
const DefaultBuildsPerHour = 120

// Config configures a Store. Pool, Fingerprint and Format are required.
type Config struct {
	Pool *pool.Pool
	// Fingerprint names everything that decides the bytes of a template, by content. It does not
	// wait: for a spec whose content is not known yet it returns [ErrUnresolved].
	Fingerprint func(diskfs.Spec) (string, error)
	// Resolve, if not nil, waits until Fingerprint knows what a content is, or returns why it
	// never will, made by [NoContent].
	Resolve func(ctx context.Context, content string) error
	// Format makes what spec says in an empty file, verified and durable. Where the machine cannot do
	// that, the error is made by [NoFormatter]; where it lacks the content, by [NoContent].
	Format func(ctx context.Context, f *os.File, spec diskfs.Spec) (Provenance, error)
	// Progress, if not nil, says what Format does for spec at the moment, or "".
	Progress    func(spec diskfs.Spec) string
	LockTimeout time.Duration // how long a build waits for another process; 0 is 10 minutes
	MaxBuilds   int           // builds at the same time; 0 is DefaultMaxBuilds
	// BuildsPerHour is how many builds may begin in a row, and then per hour, evenly; 0 means
	// no limit. A call that finds a template, or joins a build, does not count, nor does
	// [Store.Prewarm].
	BuildsPerHour int
	// Budget, if not nil, is called after each build. It returns how many bytes of the pool
	// all templates together may take. The least recently used are removed until they fit.
	Budget func() (int64, error)
	// Trimmed, if not nil, is called for each template that was removed to meet Budget.
	Trimmed func(key string, bytes int64)
	// Observe, if not nil, is called for each build that ended, or was refused with ErrTooMany.
	Observe func(spec diskfs.Spec, took time.Duration, err error)
}

// Store finds and builds the templates of a pool.
type Store struct {
	cfg    Config
	ctx    context.Context // of builds: canceled by Close
	cancel context.CancelFunc
	builds singleflight.Group
	slots  chan struct{} // contains one element for each build under way
	pace   pace
	queue  queue

	outcomes outcomes
	repeats  logs.Repeats // of builds that fail

	trimming sync.Mutex // held while trim removes templates

	mu       sync.Mutex
	verified map[identity]Record
	touched  map[string]time.Time // by key: when its use was noted last
	holders  map[string]int       // by key: see hold
	retained []diskfs.Spec        // see Retain
}

// NewStore returns a Store of c's pool.
func NewStore(c Config) *Store {
	if c.LockTimeout == 0 {
		c.LockTimeout = defaultLockTimeout
	}
	if c.MaxBuilds == 0 {
		c.MaxBuilds = DefaultMaxBuilds
	}
	ctx, cancel := context.WithCancel(context.Background())
	return &Store{
		cfg: c, ctx: ctx, cancel: cancel, slots: make(chan struct{}, c.MaxBuilds), pace: newPace(c.BuildsPerHour),
		queue:    queue{slots: c.MaxBuilds, builds: map[string]*work{}},
		verified: map[identity]Record{}, touched: map[string]time.Time{}, holders: map[string]int{},
	}
}

// Close ends the builds under way and waits until they have ended.
func (s *Store) Close() {
	s.cancel()
	for range cap(s.slots) { // a build frees its slot when it ends; Close keeps all of them
		s.slots <- struct{}{}
	}
}

var keyPattern = regexp.MustCompile(`^[a-z0-9]+-[0-9]+m-[0-9a-f]{16}$`)

// Key returns the name of a spec's template. All sizes of a disk share the template of its content, and
// its key has the size 0.
func Key(spec diskfs.Spec, fingerprint string) string {
	return fmt.Sprintf("%s-%dm-%s", spec.Filesystem, spec.Size/diskfs.MiB, fingerprint)
}

// KeyOf returns the key of the template that [Store.Ensure] builds for spec at this moment. It does not
// wait for anything.
func (s *Store) KeyOf(spec diskfs.Spec) (string, error) {
	spec, err := templateOf(spec)
	if err != nil {
		return "", err
	}
	return s.keyOf(spec)
}

// keyOf is [Store.KeyOf] for what templateOf has returned.
func (s *Store) keyOf(spec diskfs.Spec) (string, error) {
	fp, err := s.cfg.Fingerprint(spec)
	return Key(spec, fp), err
}

// Ensure returns the template of spec, and builds it if there is none. Errors are those of
// [diskfs.Spec.Validate], [ErrBuilding], [ErrNoFormatter], [ErrTooMany], [pool.ErrFull],
// [pool.ErrLocked], or those of [Config].Format.
//
// If the template is not ready two seconds before ctx's deadline, or when half of a time of less
// than four seconds has passed, Ensure returns [ErrBuilding], which says what it waits for.
func (s *Store) Ensure(ctx context.Context, spec diskfs.Spec) (*Template, error) {
	spec, err := templateOf(spec)
	if err != nil {
		return nil, err
	}
	key, err := s.resolved(ctx, spec)
	if errors.Is(err, ErrBuilding) {
		return nil, err
	}
	if err != nil {
		return s.newest(spec, err)
	}
	defer s.hold(key)() // a template that somebody waits for is not trimmed
	for tries := 0; ; tries++ {
		// The lookup takes no lock, so a hit waits for nobody.
		t, err := s.Lookup(key)
		if err == nil {
			t.Hit = tries == 0
			s.Touch(key)
			return t, nil
		}
		// If the template is absent right after its build, a clean-all came between, so try
		// once more.
		if !errors.Is(err, os.ErrNotExist) && !errors.Is(err, ErrCorrupt) || tries > 1 {
			return nil, err
		}
		err = s.join(ctx, key, spec, purpose{})
		if errors.Is(err, ErrNoFormatter) {
			return s.newest(spec, err)
		}
		if err != nil {
			return nil, err
		}
	}
}

// templateOf returns the spec of the template that a volume is cloned from: its own, or for a disk that of
// the disk's content, whatever size the volume has.
func templateOf(spec diskfs.Spec) (diskfs.Spec, error) {
	if spec.IsDisk() && spec.Content != "" {
		return diskfs.Spec{Filesystem: spec.Filesystem, Content: spec.Content}, diskfs.CheckContent(spec.Content)
	}
	if err := spec.Validate(); err != nil {
		return spec, err
	}
	if fs, err := diskfs.Lookup(spec.Filesystem); err != nil || !fs.Formatted() {
		return spec, fmt.Errorf("%w: filesystem %q has no template: its volumes are sparse files", diskfs.ErrInvalid, spec.Filesystem)
	}
	return spec, nil
}

// resolved returns the key of the template of spec. It waits, as long as ctx allows, until it is known
// what spec's content is; then the error is [ErrBuilding].
func (s *Store) resolved(ctx context.Context, spec diskfs.Spec) (string, error) {
	key, err := s.keyOf(spec)
	if !errors.Is(err, ErrUnresolved) || s.cfg.Resolve == nil {
		return key, err
	}
	soon, cancel := patient(ctx)
	defer cancel()
	what := fmt.Sprintf("it is being found out what content %s is at the moment", spec.Content)
	defer waits(ctx, "", func() string { return what })()
	if err := s.cfg.Resolve(soon, spec.Content); soon.Err() != nil {
		return "", &waiting{what}
	} else if err != nil {
		return "", err
	}
	return s.keyOf(spec)
}

// Lookup opens and verifies the template of a key. It returns [os.ErrNotExist] if there is no
// file of that name, and [ErrCorrupt] if the file is not that template.
//
// The whole content is read when this process opens a file for the first time, or for a large one when
// that happens the first time since the node's boot, and again only if stat(2) shows that the file has
// changed.
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
	f, err := s.open(key)
	if err != nil {
		return nil, err
	}
	r, bytes, err := s.verifyOnce(f, key)
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("template %s: %w", key, err)
	}
	return &Template{File: f, Record: r, Bytes: bytes, letGo: letGo}, nil
}

// open opens a template for reading, whatever file has its name.
func (s *Store) open(key string) (*os.File, error) {
	return os.OpenFile(s.cfg.Pool.Template(key), os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
}

// newest returns the latest template of spec's content, with any fingerprint, so that a warm
// cache keeps serving when the formatter is gone.
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
	if best == nil && errors.Is(cause, ErrNoContent) {
		return nil, cause
	}
	if best == nil {
		return nil, fmt.Errorf("%w of %s: %w", ErrNoFormatter, spec, cause)
	}
	best.Hit = true
	s.Touch(best.Key)
	klog.InfoS("Serving a template that cannot be built any more", "template", best.Key, "built", best.Built, "cause", cause)
	return best, nil
}

// remove removes a template's name unless somebody holds its lock. It takes the lock and then
// asks still whether the template should go.
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
