// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package warm

import (
	"context"
	"errors"
	"os"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/mount"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/logs"
)

// Form is how far a volume is made ready.
type Form string

// The forms.
const (
	Mounted  Form = "mounted"  // attached, and mounted at no path
	Volatile Form = "volatile" // the same, on a loop device that drops flushes
	Unnamed  Form = "unnamed"  // an image, synced: for claims, block devices and disk.img
)

// forms are all of them.
var forms = []Form{Mounted, Volatile, Unnamed}

// Kind is what ready volumes have in common.
type Kind struct {
	Template string // key; empty if they are made of a golden
	Golden   string // generation, and its UUID
	Form     Form
}

// Volume is ready to be handed out.
type Volume struct {
	File *os.File // the image, which has no name and no record, and is synced
	UUID uuid.UUID
	Root *mount.Detached // its filesystem; nil for an [Unnamed] one
	Made time.Time
	// Restore, if not nil, is called before a volume ends that nobody got. It takes back what would
	// outlive its descriptors.
	Restore func() error
}

// Close ends a volume that nobody got: what only its descriptors hold ends with them.
func (v *Volume) Close() error {
	var errs []error
	if v.Restore != nil {
		errs = append(errs, v.Restore())
	}
	if v.Root != nil {
		errs = append(errs, v.Root.Close())
	}
	return errors.Join(append(errs, v.File.Close())...)
}

// Config says what is kept, and how it is made. Make, Quiet and Room are required, unless Most is 0.
type Config struct {
	// Level is how many volumes of a kind are kept at least, once it was asked for.
	Level int
	// Most is how many volumes of all kinds are kept; 0 means none.
	Most int
	// Make makes a volume ready from a template or golden. Its error is [os.ErrNotExist] while that is not there.
	Make func(ctx context.Context, k Kind, spec diskfs.Spec) (*Volume, error)
	// Quiet reports whether nobody waits for the node at this moment.
	Quiet func() bool
	// Room returns an error while the node is too short of something to keep volumes ready.
	Room func() error
	// Recall, if not nil, returns what was worth keeping when an earlier process ended.
	Recall func() []Want
	// Note, if not nil, is told now and then what is worth keeping.
	Note func([]Want)
}

// Want is a kind that is worth keeping.
type Want struct {
	Kind  Kind
	Spec  diskfs.Spec
	Level int
}

// Stock has the volumes that are ready. Its methods may be called at the same time. A nil Stock is
// empty.
type Stock struct {
	cfg    Config
	ctx    context.Context // of the keeper: canceled by Close
	cancel context.CancelFunc
	wake   chan struct{}
	done   chan struct{} // closed when the keeper has ended

	repeats logs.Repeats // of volumes that cannot be made

	mu      sync.Mutex
	shelves map[Kind]*shelf
	asked   map[Kind]time.Time // when each kind was asked for last, and not ready
	pause   time.Time          // nothing is made before
	taken   map[Form]*Taken
}

// shelf has the ready volumes of one kind. The Stock's lock guards it.
type shelf struct {
	spec  diskfs.Spec
	level int       // how many to keep
	ready []*Volume // the oldest first
	least int       // the fewest that were ready since the last review
	used  time.Time
	retry time.Time // nothing is made before, since the last try failed
}

// Taken counts what was asked of a form.
type Taken struct{ Hits, Misses int64 }

// New returns a Stock, or nil where nothing is to be kept.
func New(c Config) *Stock {
	if c.Most <= 0 {
		return nil
	}
	c.Level = min(max(c.Level, 1), c.Most)
	ctx, cancel := context.WithCancel(context.Background())
	s := &Stock{
		cfg: c, ctx: ctx, cancel: cancel, wake: make(chan struct{}, 1), done: make(chan struct{}),
		shelves: map[Kind]*shelf{}, asked: map[Kind]time.Time{}, taken: map[Form]*Taken{},
	}
	for _, form := range forms {
		s.taken[form] = &Taken{}
	}
	return s
}

// Start makes volumes in the background until Close.
func (s *Stock) Start() {
	if s != nil {
		go s.keep(s.ctx)
	}
}

// Close gives back all that is ready. It follows Start.
func (s *Stock) Close() {
	if s == nil {
		return
	}
	s.cancel()
	<-s.done
	s.note()
	s.empty()
}

// Take returns a volume of a kind, or nil if none is ready.
func (s *Stock) Take(k Kind) *Volume {
	if s == nil {
		return nil
	}
	v, known := s.take(k)
	if known {
		time.AfterFunc(answerFirst, s.nudge)
	}
	return v
}

// answerFirst is how long the keeper sleeps on, so that it does not take the processor from the answer
// to whoever took a volume.
const answerFirst = 5 * time.Millisecond

// take takes the oldest volume of a kind. If the kind is known, one is missing now.
func (s *Stock) take(k Kind) (v *Volume, known bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	sh := s.shelves[k]
	if sh == nil || len(sh.ready) == 0 {
		s.taken[k.Form].Misses++
		if sh != nil && sh.retry.IsZero() { // more would have helped
			s.raise(sh, 2*sh.level)
		}
		return nil, sh != nil
	}
	s.taken[k.Form].Hits++
	v, sh.ready = sh.ready[0], sh.ready[1:]
	sh.used = time.Now()
	sh.least = min(sh.least, len(sh.ready))
	return v, true
}

// Want has volumes of a kind be kept, since somebody was given one that was not ready. Where others
// would have to go for it, it takes a second time within a day: a kind that is asked for once, such as
// one of many sizes, drives out none.
func (s *Stock) Want(k Kind, spec diskfs.Spec) {
	if s == nil {
		return
	}
	s.mu.Lock()
	if again := s.askedAgain(k); again || s.shelves[k] != nil || s.free() >= s.cfg.Level {
		s.want(k, spec, s.cfg.Level)
	}
	s.mu.Unlock()
	s.nudge()
}

// mostAsked bounds the memory of kinds that were asked for. A node has some ten.
const mostAsked = 256

// askedAgain notes that a kind is asked for, and reports whether it was before. s.mu is locked.
func (s *Stock) askedAgain(k Kind) bool {
	now := time.Now()
	last, known := s.asked[k]
	if !known && len(s.asked) >= mostAsked {
		clear(s.asked)
	}
	s.asked[k] = now
	return known && now.Sub(last) < forgotten
}

// want makes a kind's shelf, if it has none, and room for it. s.mu is locked.
func (s *Stock) want(k Kind, spec diskfs.Spec, level int) {
	sh := s.shelves[k]
	if sh == nil {
		s.makeRoom(s.cfg.Level)
		sh = &shelf{spec: spec}
		s.shelves[k] = sh
		s.raise(sh, max(level, s.cfg.Level))
	}
	sh.used, sh.retry = time.Now(), time.Time{}
}

// free is how many more may be kept. s.mu is locked.
func (s *Stock) free() int {
	n := s.cfg.Most
	for _, sh := range s.shelves {
		n -= sh.level
	}
	return n
}

// raise raises a level as far as there is room. s.mu is locked.
func (s *Stock) raise(sh *shelf, level int) {
	sh.level = max(sh.level, min(level, sh.level+s.free()))
}

// makeRoom lowers levels until there is room for n volumes: first those that are higher than
// they must be, and then those of the kinds that were not used for longest. s.mu is locked.
func (s *Stock) makeRoom(n int) {
	for free := s.free(); free < n; free = s.free() {
		if high := s.oldest(s.cfg.Level); high != nil {
			high.level = max(s.cfg.Level, high.level-(n-free))
		} else {
			s.oldest(0).level = 0 // the keeper gives its volumes back
		}
	}
}

// oldest is the shelf that was not used for longest, of those above a level, or nil. s.mu is locked.
func (s *Stock) oldest(above int) (oldest *shelf) {
	for _, sh := range s.shelves {
		if sh.level > above && (oldest == nil || sh.used.Before(oldest.used)) {
			oldest = sh
		}
	}
	return oldest
}

// Replace asks about each kind which one takes its place, and gives back all that is ready of a kind that changes,
// or that is not to be kept. Levels stay.
func (s *Stock) Replace(with func(Kind) (k Kind, keep bool)) {
	if s == nil {
		return
	}
	s.mu.Lock()
	var old []*Volume
	for k, sh := range s.shelves {
		is, keep := with(k)
		if keep && is == k {
			continue
		}
		delete(s.shelves, k)
		old = append(old, sh.ready...)
		if sh.ready, sh.least, sh.retry = nil, 0, (time.Time{}); keep && s.shelves[is] == nil {
			s.shelves[is] = sh
		}
	}
	s.mu.Unlock()
	discard(old)
	s.nudge()
}

// Drain gives back all that is ready, for whoever needs the space, and makes nothing for a while.
func (s *Stock) Drain() {
	if s == nil {
		return
	}
	s.mu.Lock()
	s.pause = time.Now().Add(drained)
	s.mu.Unlock()
	s.empty()
}

// drained is how long nothing is made after a Drain.
const drained = 10 * time.Second

func (s *Stock) empty() {
	s.mu.Lock()
	var all []*Volume
	for _, sh := range s.shelves {
		all = append(all, sh.ready...)
		sh.ready = nil
	}
	s.mu.Unlock()
	discard(all)
}

// discard ends volumes, several at a time: the kernel takes milliseconds to unmount one.
func discard(volumes []*Volume) {
	var all sync.WaitGroup
	turns := make(chan struct{}, 4)
	for _, v := range volumes {
		turns <- struct{}{}
		all.Go(func() {
			defer func() { <-turns }()
			if err := v.Close(); err != nil {
				logs.Warn("A volume that was kept ready cannot be given back", "err", err)
			}
		})
	}
	all.Wait()
}

// Shelf is what there is of a kind.
type Shelf struct {
	Kind         Kind
	Spec         diskfs.Spec
	Ready, Level int
	Oldest       time.Time // when the first of them was made; zero if none is ready
}

// Shelves lists what is ready, and what was asked for since the start.
func (s *Stock) Shelves() (shelves []Shelf, taken map[Form]Taken) {
	taken = map[Form]Taken{}
	if s == nil {
		return nil, taken
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for k, sh := range s.shelves {
		is := Shelf{Kind: k, Spec: sh.spec, Ready: len(sh.ready), Level: sh.level}
		if len(sh.ready) > 0 {
			is.Oldest = sh.ready[0].Made
		}
		shelves = append(shelves, is)
	}
	for form, n := range s.taken {
		taken[form] = *n
	}
	return shelves, taken
}
