// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"
	"k8s.io/klog/v2"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/logs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/template"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/device"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/golden"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/place"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/quota"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/space"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/sweep"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/warm"
)

// Config is what a Manager works with.
type Config struct {
	Pool      *pool.Pool      // required
	Templates *template.Store // required, except for Sweep
	// TargetRoot is the directory below which volumes are staged and published: kubelet's.
	// Nothing outside of it is ever touched. Required.
	TargetRoot string
	// GrowFilesystem makes the unmounted filesystem on a block device as large as the device.
	// It is for filesystems that cannot grow while they are mounted. With nil those stay as
	// they are.
	GrowFilesystem func(ctx context.Context, fs *diskfs.Filesystem, device string) error
	// Headroom is the space of the pool that new volumes leave free; the zero value is none.
	Headroom size.Share
	// Overcommit is how many times its own size the pool promises to thin claims; 0 is 1.
	Overcommit float64
	// Limits are those of inline volumes; the zero value is none.
	Limits quota.Limits
	// DefaultDurability is what a new inline volume gets that asks for none; empty is
	// [image.Synced].
	DefaultDurability image.Durability
	// Content tells what a content of the operator is, if the pods of a namespace may use it. With nil
	// there are no contents.
	Content func(name, namespace string) (Content, error)
	// Goldens say what is kept of volumes for the next ones. With nil nothing is.
	Goldens *Goldens
	// Made, if not nil, is called once for each volume that was made.
	Made func(Result)
	// Spare, if not nil, gives back space of the pool that is only kept to save time. It is called
	// before something is refused for want of space.
	Spare func()
	// Warm is how many volumes of each kind of disk are kept ready before anybody asks for them,
	// once one was asked for, and WarmMost how many of all kinds; WarmMost 0 means none.
	Warm, WarmMost int
}

// Manager has the volumes of a pool. Its methods may be called at the same time. One
// operation at a time works on a volume or snapshot, and a second one returns
// [errdefs.ErrBusy].
type Manager struct {
	pool      *pool.Pool
	images    *image.Store
	goldens   *golden.Store
	root      *place.Root
	devices   *device.Devices
	space     *space.Space
	quota     *quota.Ledger
	sweeper   *sweep.Sweeper
	copies    *copies
	contents  contents
	mounts    mounter
	growth    growth
	locks     locks
	work      background
	endings   endings
	commits   *commits
	trims     trims // up to the last Trim
	disks     disks // up to the last CheckDisks
	losses    losses
	leftovers leftovers
	census    census
	unread    logs.Repeats                                  // of images that cannot be read
	report    func(Result)                                  // of new volumes; may be nil
	contentOf func(name, namespace string) (Content, error) // may be nil

	durability image.Durability // of new inline volumes that ask for none
}

// NewManager returns a Manager. It leaves alone what an earlier process of the same pool did
// not finish: that is for [Manager.Sweep].
func NewManager(c Config) (*Manager, error) {
	root, err := place.Open(c.TargetRoot)
	if err != nil {
		return nil, err
	}
	images, goldens := image.NewStore(c.Pool), golden.NewStore(c.Pool)
	devices := device.New(c.Pool, images)
	copies := &copies{images: images, root: root, devices: devices, freeze: defaultFreeze}
	m := &Manager{
		pool: c.Pool, images: images, goldens: goldens, root: root, devices: devices, copies: copies, durability: c.DefaultDurability,
		contents: contents{templates: c.Templates, images: images, goldens: goldens, copies: copies, misses: &misses{}},
		mounts:   mounter{pool: c.Pool, images: images, root: root, devices: devices},
		endings:  newEndings(),
		report:   c.Made, contentOf: c.Content,
	}
	// This reads all records, several at a time, and the Store remembers them for the ledger.
	m.space, err = space.New(c.Pool, images, space.Config{Headroom: c.Headroom, Overcommit: c.Overcommit, Spare: func() { m.spare(c.Spare) }})
	if err != nil {
		root.Close()
		return nil, err
	}
	if m.quota, err = quota.New(c.Pool, images, c.Limits); err != nil {
		root.Close()
		return nil, err
	}
	m.growth = growth{images: images, mounts: m.mounts, work: &m.work, tool: c.GrowFilesystem}
	m.commits = newCommits(m, c.Goldens)
	m.sweeper = sweep.New(sweep.Config{
		Pool: c.Pool, Images: images, Goldens: goldens, Root: root, Quota: m.quota, Space: m.space, Lock: m.locks.volume,
		Thaw: copies.thawLeft, Commit: m.resumeCommits(c.Templates != nil),
	})
	m.work.ctx, m.work.cancel = context.WithCancel(context.Background())
	m.contents.warm = warmth{pool: c.Pool, templates: c.Templates}
	m.contents.warm.stock = warm.New(m.stockConfig(c))
	m.contents.warm.stock.Start()
	return m, nil
}

// spare gives back what is only kept to save time, and waits for what deleted volumes still take.
func (m *Manager) spare(others func()) {
	if others != nil {
		others()
	}
	m.contents.warm.stock.Drain()
	m.endings.patiently()
}

// Close ends the work under way, which leaves nothing behind, and closes kubelet's directory.
// Volumes stay as they are.
func (m *Manager) Close() error {
	m.work.cancel()
	m.contents.warm.stock.Close()
	m.work.wait.Wait()
	return errors.Join(m.endings.wait(context.Background()), m.root.Close())
}

// made reports a new volume to Config.Made.
func (m *Manager) made(id string, res Result) {
	m.contents.misses.forget(id)
	m.losses.forget(id)
	if m.report != nil {
		m.report(res)
	}
}

// Sweep takes away what crashes, reboots and lost calls have left on the node: see package
// sweep.
func (m *Manager) Sweep(ctx context.Context, o sweep.Options) ([]sweep.Action, error) {
	if !o.DryRun {
		m.commits.expire()
	}
	actions, err := m.sweeper.Sweep(ctx, o)
	if err == nil {
		m.leftovers.note(actions)
	}
	return actions, err
}

// resumeCommits is [sweep.Config].Commit: nil for a process that ends with its sweep.
func (m *Manager) resumeCommits(lasts bool) func(id string) {
	if !lasts {
		return nil
	}
	return m.commits.resume
}

// Mounted counts the volumes that are mounted somewhere on the node.
func (m *Manager) Mounted() (int, error) { return m.sweeper.Mounted() }

// background is work that outlives the call that asked for it, until Close.
type background struct {
	ctx    context.Context
	cancel context.CancelFunc
	group  singleflight.Group
	wait   sync.WaitGroup
}

// outlive does work that may take longer than its caller has time. Callers that ask for the
// same key meanwhile share one run of it. The key also names the work in the error.
func outlive[T any](ctx context.Context, b *background, key string, do func(context.Context) (T, error)) (T, error) {
	b.wait.Add(1)
	done := b.group.DoChan(key, func() (any, error) { return do(b.ctx) })
	result := make(chan singleflight.Result, 1)
	go func() {
		defer b.wait.Done()
		result <- <-done
	}()
	select {
	case r := <-result:
		return r.Val.(T), r.Err
	case <-ctx.Done():
		var none T
		return none, &underWay{key, context.Cause(ctx)}
	}
}

// underWay is an [errdefs.ErrUnderWay], and why the caller's time ended.
type underWay struct {
	key   string
	cause error
}

func (u *underWay) Error() string {
	return fmt.Sprintf("%v: %s: Kubernetes will ask again, and the work goes on meanwhile", errdefs.ErrUnderWay, u.key)
}
func (u *underWay) Unwrap() []error { return []error{errdefs.ErrUnderWay, u.cause} }

// locks let one operation at a time work on a volume or a snapshot. Nobody waits for a lock:
// one that is taken returns [errdefs.ErrBusy].
//
// A lock ends with its call. Work that outlives its call holds the image's own lock too
// ([image.Store.Exclusive]).
type locks struct {
	mu   sync.Mutex
	held map[string]bool // by kind and id
	left time.Time       // when the last one was let go
}

// quiet reports whether no operation is under way, and none has just ended: callers that make one
// after the other are about to make the next.
func (l *locks) quiet() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.held) == 0 && time.Since(l.left) > lull
}

// lull is longer than most callers take between two calls.
const lull = 5 * time.Millisecond

// volume locks a volume until unlock is called.
func (l *locks) volume(id string) (unlock func(), err error) { return l.lock("volume " + id) }

// snapshot locks a snapshot until unlock is called.
func (l *locks) snapshot(id string) (unlock func(), err error) { return l.lock("snapshot " + id) }

func (l *locks) lock(key string) (unlock func(), err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.held[key] {
		return nil, fmt.Errorf("%s: %w", key, errdefs.ErrBusy)
	}
	if l.held == nil {
		l.held = map[string]bool{}
	}
	l.held[key] = true
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		delete(l.held, key)
		l.left = time.Now()
	}, nil
}

// undo is a list of cleanup steps, run last first if the operation fails.
type undo []func() error

func (u *undo) add(step func() error) {
	if step != nil {
		*u = append(*u, step)
	}
}

// on runs the steps if there is an error. What goes wrong in them is logged, and is not part of the error: that tells
// a user why the operation failed.
func (u undo) on(err *error) {
	if *err == nil {
		return
	}
	for i := len(u) - 1; i >= 0; i-- {
		if e := u[i](); e != nil {
			klog.ErrorS(e, "Cleaning up after a failed operation", "failure", *err)
		}
	}
}
