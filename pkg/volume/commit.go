// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/semaphore"
	"k8s.io/klog/v2"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/health"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/fiemap"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/fsctl"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/mount"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/golden"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/place"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/space"
)

// commits make generations of goldens from volumes whose pods are done.
//
// The call that ends a volume only moves its image among those that are kept: from there on the volume is gone, and
// a plugin that dies leaves the image to the next one. The rest is done after the answer, one by one, on a
// clone that has no name. So whatever happens, the golden has its last generation or the new one, and both are whole.
type commits struct {
	generations
	cfg    *Goldens // nil: there are none
	images *image.Store
	space  *space.Space
	work   *background
	warm   *warmth
	turns  *semaphore.Weighted

	outcomes outcomes

	mu     sync.Mutex
	kept   map[string]kept     // volumes that are kept, by id
	queues map[string][]string // ids by namespace, while commits of it are under way: those that wait
}

// kept is a volume that has ended, and is to be committed.
type kept struct {
	namespace string
	to        golden.Name
}

// mostKept bounds how many volumes of one namespace wait for their commits. They take space until then. Beyond that,
// the oldest that waits to be committed to the same golden gives way: the last write wins.
const mostKept = 16

// mostCommits is how many commits are made at the same time, each of another namespace.
const mostCommits = 2

func newCommits(m *Manager, cfg *Goldens) *commits {
	return &commits{
		generations: generations{pool: m.pool, goldens: m.goldens, copies: m.copies},
		cfg:         cfg, images: m.images, space: m.space, work: &m.work, warm: &m.contents.warm, turns: semaphore.NewWeighted(mostCommits),
		kept: map[string]kept{}, queues: map[string][]string{},
	}
}

// mayUse returns [errdefs.ErrInvalid] if a volume of a namespace can have nothing to do with a golden.
func (c *commits) mayUse(s golden.Source, namespace string) error {
	if c.cfg == nil {
		return fmt.Errorf("%w: golden %.64q: this node has no goldens; the operator turns them on with --goldens", errdefs.ErrInvalid, s.Name)
	}
	if _, err := golden.ParseName(namespace + "/" + s.Name); err != nil {
		return fmt.Errorf("%w: golden %.64q: nobody says which namespace the volume is of (%.64q); for claims the provisioner does with --extra-create-metadata",
			errdefs.ErrInvalid, s.Name, namespace)
	}
	return nil
}

// check returns [errdefs.ErrInvalid] if a volume may not commit to what it asks for.
func (c *commits) check(l image.Lineage, namespace string) error {
	if l.CommitTo == "" {
		return nil
	}
	_, err := c.target(l, namespace)
	return err
}

// target is the golden that a volume of a namespace commits to.
func (c *commits) target(l image.Lineage, namespace string) (golden.Name, error) {
	s, err := golden.Target(l, "")
	if err == nil {
		err = c.mayUse(s, namespace)
	}
	if err == nil && s.Kind == golden.Shared {
		err = c.cfg.CheckWrite(s.Name, namespace)
	}
	return s.Golden(namespace), err
}

// keep takes a volume that ends out of the pool's volumes, and reports whether its image is kept to be committed.
// Root is its filesystem, or nil if that is not mounted. If it is not kept, the volume stays.
func (c *commits) keep(img *image.Image, root *mount.Detached) bool {
	r := img.Record
	if r.CommitTo == "" {
		return false
	}
	err := c.keepIfAsked(img, root)
	if err != nil {
		c.outcomes.not(r, err)
	}
	return err == nil
}

func (c *commits) keepIfAsked(img *image.Image, root *mount.Detached) error {
	r := img.Record
	to, err := c.admit(r)
	if err != nil {
		return err
	}
	if root != nil {
		if err := asks(root, r.Condition()); err != nil {
			return err
		}
	}
	if err := c.reserve(r.ID, kept{r.Pod.Namespace, to}); err != nil {
		return err
	}
	if err := c.images.Keep(img); err != nil {
		c.release(r.ID)
		return err
	}
	return nil
}

// admit decides, in microseconds, if a commit is worth beginning, and returns the golden.
func (c *commits) admit(r image.Record) (golden.Name, error) {
	to, err := c.target(r.Lineage, r.Pod.Namespace)
	if err != nil {
		return to, err
	}
	if outlived, err := r.Outlived(); err != nil || outlived {
		return to, errors.Join(err, errOutlived)
	}
	return to, c.space.Check()
}

// reserve counts a volume among those that are kept.
func (c *commits) reserve(id string, is kept) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, waits := c.kept[id]; waits {
		return fmt.Errorf("%w: an earlier volume of the same id still waits for its commit", errdefs.ErrUnderWay)
	}
	if n := c.count(is.namespace); n >= mostKept && !c.supersede(is) {
		return fmt.Errorf("%w: %d commits of namespace %s are under way; let fewer volumes end at once", errdefs.ErrLimit, n, is.namespace)
	}
	c.kept[id] = is
	return nil
}

// count counts the volumes of a namespace that are kept. c.mu is locked.
func (c *commits) count(namespace string) (n int) {
	for _, k := range c.kept {
		if k.namespace == namespace {
			n++
		}
	}
	return n
}

// supersede lets the oldest volume go that waits to be committed to the same golden as a new one. c.mu is locked.
func (c *commits) supersede(by kept) bool {
	waiting := c.queues[by.namespace]
	i := slices.IndexFunc(waiting, func(id string) bool { return c.kept[id].to == by.to })
	if i < 0 {
		return false
	}
	id := waiting[i]
	if err := c.images.RemoveKept(id); err != nil {
		klog.ErrorS(err, "The image of a volume that is not to be committed any more cannot be removed", "volume", id)
		return false
	}
	c.queues[by.namespace] = slices.Delete(waiting, i, i+1)
	delete(c.kept, id)
	c.outcomes.count(Superseded)
	klog.V(2).InfoS("A volume is not committed, since later ones to the same golden wait", "volume", id, "golden", by.to)
	return true
}

func (c *commits) release(id string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.kept, id)
}

var (
	// errOutlived means that what was not synced in a volume may be missing.
	errOutlived = fmt.Errorf("%w: the node has rebooted since the volume was made, so what was written to it may be missing", errdefs.ErrState)
	// errUnseen means that the kernel may have dropped what it could not write.
	errUnseen = fmt.Errorf("%w: the plugin was killed, or somebody else unmounted the volume, before it was seen that everything "+
		"is written to its image", errdefs.ErrState)
	// errUnmarked means that a volume's pod has not asked for the commit.
	errUnmarked = errors.New("the volume has no file " + image.CommitMark)
)

// asks returns [errUnmarked] if the pod has not asked for the commit, and [errdefs.ErrState] if the filesystem has
// given up: then anything may be missing.
func asks(d *mount.Detached, when image.CommitWhen) error {
	root, err := mount.Open(d.File())
	if err != nil {
		return fmt.Errorf("%w: its filesystem has given up: %w; see the kernel log", errdefs.ErrState, err)
	}
	defer root.Close()
	if err := checkAlive(root); err != nil || when == image.CommitAlways {
		return err
	}
	dir, err := markDir(root)
	if err == nil {
		err = dir.Close()
	}
	return err
}

func checkAlive(root *os.File) error {
	is, err := fsctl.StatusOf(root)
	if err == nil && is.ReadOnly {
		err = syscall.EROFS
	}
	if err == nil {
		_, err = root.Readdirnames(1)
	}
	if err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("%w: its filesystem has given up: %w; see the kernel log", errdefs.ErrState, err)
	}
	return nil
}

// markDir opens the directory of the mark in a volume, or returns [errUnmarked]. No link is followed: the mark
// is a regular file.
func markDir(root *os.File) (*os.File, error) {
	mark, err := mount.OpenTarget(root, image.CommitMark, 0)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errUnmarked, err)
	}
	defer mark.Close()
	if fi, err := mark.Stat(); err != nil || !fi.Mode().IsRegular() {
		return nil, errors.Join(errUnmarked, err)
	}
	return mount.OpenTarget(root, image.CommitDir, syscall.O_DIRECTORY)
}

// begin commits a volume that is kept, in the background, after those of its namespace that were kept before. If
// something could not be written to its image, it goes.
func (c *commits) begin(r image.Record, unwritten error) {
	if unwritten != nil {
		c.outcomes.not(r, fmt.Errorf("not everything could be written to its image: %w", c.pool.FullIfNoRoom(unwritten)))
		c.drop(r.ID)
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	namespace := c.kept[r.ID].namespace
	waiting, underWay := c.queues[namespace]
	c.queues[namespace] = append(waiting, r.ID)
	if !underWay {
		c.work.wait.Go(func() { c.serve(namespace) })
	}
}

// serve commits the volumes of a namespace, one after the other.
func (c *commits) serve(namespace string) {
	for id := c.next(namespace); id != ""; id = c.next(namespace) {
		c.finish(c.work.ctx, id)
	}
}

// next takes the next volume of a namespace from its queue, or returns "" and ends the queue.
func (c *commits) next(namespace string) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	waiting := c.queues[namespace]
	if len(waiting) == 0 {
		delete(c.queues, namespace)
		return ""
	}
	c.queues[namespace] = waiting[1:]
	return waiting[0]
}

// drop lets the image of a volume go that is kept.
func (c *commits) drop(id string) {
	if err := c.images.RemoveKept(id); err != nil {
		klog.ErrorS(err, "The image of a volume that was to be committed cannot be removed; the next sweep tries again", "volume", id)
	}
	c.release(id)
}

// resume commits a volume that an earlier process kept, in the background.
func (c *commits) resume(id string) {
	img, err := c.images.OpenKept(id)
	if err != nil {
		return // it is done
	}
	defer img.Close()
	c.mu.Lock()
	_, known := c.kept[id]
	if !known {
		to, _ := c.target(img.Record.Lineage, img.Record.Pod.Namespace) // an error comes again with the commit
		c.kept[id] = kept{img.Record.Pod.Namespace, to}
	}
	c.mu.Unlock()
	if !known {
		c.begin(img.Record, nil)
	}
}

// finish commits a volume that is kept, and lets its image go, however that went. If ctx ends, the image stays: the
// next process goes on with it.
func (c *commits) finish(ctx context.Context, id string) {
	if ctx.Err() != nil || c.turns.Acquire(ctx, 1) != nil {
		return
	}
	defer c.turns.Release(1)
	img, err := c.images.OpenKept(id)
	if errors.Is(err, errdefs.ErrNotFound) {
		c.release(id)
		return
	}
	if err == nil {
		defer img.Close()
		err = c.commit(ctx, img)
	}
	if ctx.Err() != nil {
		return
	}
	if err != nil {
		r := image.Record{ID: id}
		if img != nil {
			r = img.Record
		}
		c.outcomes.not(r, err)
	}
	c.drop(id)
}

// commit makes the next generation of a golden from a volume.
func (c *commits) commit(ctx context.Context, img *image.Image) error {
	started := time.Now()
	r := img.Record
	of, err := c.target(r.Lineage, r.Pod.Namespace)
	if err != nil {
		return err
	}
	if outlived, err := r.Outlived(); err != nil || outlived {
		return errors.Join(err, errOutlived)
	}
	if done, err := c.isMade(of, r); err != nil || done {
		return err
	}
	if written, err := img.Written(); err != nil || !written {
		return errors.Join(err, errUnseen)
	}
	if err := waitDetached(ctx, img); err != nil {
		return err
	}
	f, id, err := c.prepare(ctx, img.File, r.Spec, r.Condition())
	if err != nil {
		return err
	}
	defer f.Close()
	gone, extents, err := c.fit(f, of)
	if err != nil {
		return err
	}
	next := golden.Record{
		Namespace: of.Namespace, Name: of.Name, Spec: r.Spec, UUID: id, Created: time.Now().UTC(),
		Volume: r.ID, VolumeUUID: r.UUID, By: by(r),
	}
	next.Spec.Content = "" // its pod has changed it
	is, err := c.goldens.Publish(f, next)
	if err != nil {
		return err
	}
	next.Generation = is.Number
	c.warm.renew(next)
	c.outcomes.committed(of)
	c.remove(gone)
	klog.InfoS("Committed a volume", "volume", r.ID, "golden", is, "by", by(r), "extents", extents, "duration", time.Since(started).Round(time.Millisecond))
	return nil
}

// isMade reports whether a golden has a generation that was made of a volume: a process may have died right after
// that.
func (c *commits) isMade(of golden.Name, r image.Record) (bool, error) {
	all, err := c.goldens.List()
	for _, g := range all {
		if g.Name != of {
			continue
		}
		open, err := c.goldens.Open(g)
		if errors.Is(err, errdefs.ErrNotFound) {
			continue
		}
		if err != nil {
			return false, err
		}
		open.Close()
		if open.Record.Volume == r.ID && open.Record.VolumeUUID == r.UUID {
			return true, nil
		}
	}
	return false, err
}

// waitDetached waits a moment until nothing has the volume attached. If it is attached after that, for example since
// its mount has a copy in another mount namespace, it can still be written to.
func waitDetached(ctx context.Context, img *image.Image) error {
	for deadline := time.Now().Add(detached); ; time.Sleep(place.SettlePoll) {
		dev, err := loopdev.OpenBacked(img.File)
		if errors.Is(err, loopdev.ErrNotAttached) {
			return nil
		}
		if err == nil {
			err = dev.Close()
		}
		if err != nil {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%w: something still has the volume mounted, for example another mount namespace, and may write to it; find it with losetup -j %s",
				errdefs.ErrState, img.Path())
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
}

// detached is how long the kernel may take to write a volume that was unmounted.
var detached = 30 * time.Second // less in tests

// fit decides which generations go for a new one.
func (c *commits) fit(f *os.File, of golden.Name) (gone []golden.Held, extents int, err error) {
	if err := c.space.Check(); err != nil {
		return nil, 0, err
	}
	allocated, err := image.Allocated(f)
	if err != nil {
		return nil, 0, err
	}
	limits, err := c.cfg.Limits()
	if err != nil {
		return nil, 0, err
	}
	all, err := c.goldens.Held()
	if err != nil {
		return nil, 0, err
	}
	if gone, err = limits.Admit(all, of, allocated); err != nil {
		return nil, 0, err
	}
	extents, err = fiemap.Count(f)
	return gone, extents, err
}

// remove removes generations. Volumes that just start from one keep it.
func (c *commits) remove(gone []golden.Held) {
	for _, h := range gone {
		if err := c.goldens.Remove(h.Generation); err != nil {
			klog.ErrorS(err, "A golden cannot be removed; the next commit tries again", "golden", h.Generation)
			continue
		}
		klog.V(2).InfoS("Removed a golden", "golden", h.Generation, "bytes", h.Bytes, "lastUse", h.Used.UTC().Format(time.RFC3339))
	}
}

// expire removes what nobody has used for long, and gives back what is ready of a generation that is gone: commands
// remove goldens too.
func (c *commits) expire() {
	if c.cfg == nil {
		return
	}
	limits, err := c.cfg.Limits()
	var all []golden.Held
	if err == nil {
		all, err = c.goldens.Held()
	}
	if err != nil {
		klog.ErrorS(err, "Goldens that nobody uses cannot be found; the next sweep tries again")
		return
	}
	c.remove(limits.Expired(all, time.Now()))
	c.warm.keep(all)
}

// GoldenHealth are the conditions of goldens whose latest commit failed.
func (m *Manager) GoldenHealth() []health.Condition { return m.commits.outcomes.conditions() }

// Goldens lists the generations of all goldens.
func (m *Manager) Goldens() ([]golden.Held, error) { return m.goldens.Held() }

// Commits counts what became of volumes with commitTo since the plugin started, and those that wait for their
// commit.
func (m *Manager) Commits() (counts map[Outcome]int64, waiting int) {
	m.commits.mu.Lock()
	defer m.commits.mu.Unlock()
	return m.commits.outcomes.all(), len(m.commits.kept)
}
