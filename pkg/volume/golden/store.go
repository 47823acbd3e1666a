// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package golden

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/google/uuid"
	"k8s.io/klog/v2"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/openat"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/tmpfile"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
)

// recordVersion is the version of [Record] that this plugin writes, and the highest that it reads.
const recordVersion = 1

// Record describes a generation, in the attribute trusted.disktemplate of its image.
type Record struct {
	Version    int         `json:"version"`
	Namespace  string      `json:"namespace,omitempty"` // empty: shared
	Name       string      `json:"name"`
	Generation int         `json:"generation"`
	Spec       diskfs.Spec `json:"spec"`
	UUID       uuid.UUID   `json:"uuid"`
	Created    time.Time   `json:"created"`
	Volume     string      `json:"volume,omitempty"` // id of the volume that it was made of; empty if by a command
	VolumeUUID uuid.UUID   `json:"volumeUUID"`       // of that volume's filesystem: an id may come again
	By         string      `json:"by"`               // for people: the pod, or what was promoted
}

// Is is the generation that the record describes.
func (r Record) Is() Generation { return Generation{Name{r.Namespace, r.Name}, r.Generation} }

// Golden is a generation's open image and its record.
type Golden struct {
	File   *os.File
	Record Record
}

// Close closes the image. That of nil is fine.
func (g *Golden) Close() error {
	if g == nil {
		return nil
	}
	return g.File.Close()
}

// Store has the goldens of a pool. Its methods may be called at the same time. Commands may use another Store
// beside a running plugin.
type Store struct {
	pool *pool.Pool

	mu    sync.Mutex
	seen  openat.Status // of the directory, when it was read
	index map[Name][]int
	used  map[Generation]time.Time // when Touch last wrote to them, within touchEvery
}

// NewStore returns the Store of a pool.
func NewStore(p *pool.Pool) *Store { return &Store{pool: p, used: map[Generation]time.Time{}} }

// List lists the generations of all goldens, by name, the oldest of each first.
func (s *Store) List() ([]Generation, error) {
	names, err := s.pool.Goldens()
	var list []Generation
	for _, name := range names {
		if g, ok := ofFile(name); ok {
			list = append(list, g)
		}
	}
	slices.SortFunc(list, Generation.compare)
	return list, err
}

// Strange lists the names among the goldens' images that are none of ours.
func (s *Store) Strange() (strange []string, err error) {
	names, err := s.pool.Goldens()
	for _, name := range names {
		if _, ok := ofFile(name); !ok {
			strange = append(strange, name)
		}
	}
	return strange, err
}

// clockTick is longer than a tick of the kernel's coarse clock, which stamps files: 10 ms with CONFIG_HZ=100.
const clockTick = 50 * time.Millisecond

// numbers are those of a golden's generations, the oldest first. The directory is read again if it has changed.
func (s *Store) numbers(n Name) ([]int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	asked := time.Now()
	is, err := s.pool.GoldensChanged()
	if errors.Is(err, os.ErrNotExist) { // a command has opened an older pool
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if s.index != nil && is.Inode == s.seen.Inode && is.Changed.Equal(s.seen.Changed) {
		return s.index[n], nil
	}
	list, err := s.List()
	if err != nil {
		return nil, err
	}
	index := map[Name][]int{}
	for _, g := range list {
		index[g.Name] = append(index[g.Name], g.Number)
	}
	s.index = nil
	if asked.Sub(is.Changed) > clockTick { // a second change in the same tick would not be noticed
		s.index, s.seen = index, is
	}
	return index[n], nil
}

// forget has the directory read again: a change may go unnoticed where the clock was set back.
func (s *Store) forget() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.index = nil
}

// Newest opens the newest generation of a golden, or returns [errdefs.ErrNotFound].
func (s *Store) Newest(n Name) (*Golden, error) {
	for {
		numbers, err := s.numbers(n)
		if err != nil {
			return nil, err
		}
		gone := false
		for _, number := range slices.Backward(numbers) {
			g, err := s.Open(Generation{n, number})
			if !errors.Is(err, errdefs.ErrNotFound) {
				return g, err
			}
			gone = gone || !errors.Is(err, errTorn)
		}
		if !gone {
			return nil, fmt.Errorf("%w: golden %s has no generation on this node", errdefs.ErrNotFound, n)
		}
		s.forget()
	}
}

// errTorn means that a power cut has taken the content of a generation that nobody was told of yet.
var errTorn = errors.New("a power cut took its content")

// Open opens a generation, or returns [errdefs.ErrNotFound].
func (s *Store) Open(g Generation) (*Golden, error) {
	f, err := s.pool.OpenGolden(g.file())
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("%w: there is no golden %s on this node", errdefs.ErrNotFound, g)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errdefs.ErrState, err)
	}
	golden := &Golden{File: f}
	if err := golden.read(g); err != nil {
		f.Close()
		return nil, err
	}
	return golden, nil
}

func (g *Golden) read(is Generation) error {
	fi, err := g.File.Stat()
	if err != nil {
		return err
	}
	if fi.Mode().IsRegular() && fi.Size() == 0 { // on btrfs the size of an empty directory is 0 too
		return fmt.Errorf("%w: golden %s: %w", errdefs.ErrNotFound, is, errTorn)
	}
	err = pool.GetRecord(g.File, pool.VolumeAttr, &g.Record)
	if errors.Is(err, pool.ErrNoRecord) {
		return fmt.Errorf("%w: %w; the file is not one of ours: move it away", errdefs.ErrState, err)
	}
	if err != nil {
		return err
	}
	if r := g.Record; r.Version < 1 || r.Version > recordVersion || r.Is() != is {
		return fmt.Errorf("%w: %s: its record has version %d and is of golden %s, and this plugin reads version %d; upgrade the plugin or move the file away",
			errdefs.ErrState, g.File.Name(), r.Version, r.Is(), recordVersion)
	}
	return nil
}

// Torn reports whether a power cut has taken the content of a generation.
func (s *Store) Torn(g Generation) (bool, error) {
	st, err := s.pool.StatGolden(g.file())
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	return err == nil && st.Regular && st.Size == 0, err
}

// Path is where a generation's image is.
func (s *Store) Path(g Generation) string { return s.pool.Golden(g.file()) }

// New opens an empty unnamed file that can become a generation. It ends with its descriptor.
func (s *Store) New() (*os.File, error) { return s.pool.NewGolden() }

// Publish makes a file, whose content is complete, the newest generation of the golden that its record names,
// durably. If it fails, it leaves nothing.
func (s *Store) Publish(f *os.File, r Record) (Generation, error) {
	r.Version = recordVersion
	if err := tmpfile.Sync(f); err != nil {
		return Generation{}, pool.Full(err)
	}
	for {
		numbers, err := s.numbers(r.Is().Name)
		if err != nil {
			return Generation{}, err
		}
		if len(numbers) > 0 {
			r.Generation = max(r.Generation, numbers[len(numbers)-1])
		}
		r.Generation++
		if err := pool.SetRecord(f, pool.VolumeAttr, r); err != nil {
			return Generation{}, err
		}
		err = tmpfile.Link(f, s.pool.Golden(r.Is().file()))
		if errors.Is(err, os.ErrExist) { // another one came first
			continue
		}
		if err != nil { // the name may be another one's by now
			return Generation{}, pool.Full(err)
		}
		if err := tmpfile.Sync(f); err != nil {
			return Generation{}, pool.Full(errors.Join(err, s.Remove(r.Is())))
		}
		return r.Is(), nil
	}
}

// Remove makes sure that there is no such generation. Whoever has it open keeps it.
func (s *Store) Remove(g Generation) error { return s.pool.RemoveGolden(g.file()) }

// Held is a generation, and what it has of the pool.
type Held struct {
	Generation
	Bytes int64     // allocated, shared extents included
	Used  time.Time // when a volume last started from it, to within some seconds, or else when it was made
}

// Look looks at a generation without opening it. Errors are those of [Store.Open].
func (s *Store) Look(g Generation) (Held, error) {
	st, err := s.pool.StatGolden(g.file())
	if errors.Is(err, os.ErrNotExist) {
		return Held{}, fmt.Errorf("%w: there is no golden %s on this node", errdefs.ErrNotFound, g)
	}
	return Held{g, st.Allocated, st.Modified}, err
}

// Held lists all generations as [Store.List] does.
func (s *Store) Held() (all []Held, err error) {
	list, err := s.List()
	for _, g := range list {
		h, err := s.Look(g)
		if errors.Is(err, errdefs.ErrNotFound) {
			continue
		}
		if err != nil {
			return nil, err
		}
		all = append(all, h)
	}
	return all, err
}

// touchEvery is how often the use of a generation is noted on disk. Setting a file's time waits for its inode's lock,
// which a clone of the file holds: beside clones of 600 extents it took milliseconds. So of many volumes that start
// at once, and need no clone because they are ready, one waits. Which golden was used last is still known well enough:
// goldens that nobody uses stay for hours.
const touchEvery = 10 * time.Second

// Touch notes that a volume starts from a generation. A failure only makes the generation seem unused.
func (s *Store) Touch(g Generation) {
	now := time.Now()
	if !s.due(g, now) {
		return
	}
	err := os.Chtimes(s.pool.Golden(g.file()), time.Time{}, now)
	if err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, syscall.EROFS) {
		klog.V(2).InfoS("The use of a golden cannot be noted", "golden", g, "err", err)
	}
}

// due reports whether the use of a generation is to be noted now, and remembers that it is.
func (s *Store) due(g Generation, now time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	maps.DeleteFunc(s.used, func(_ Generation, at time.Time) bool { return now.Sub(at) >= touchEvery })
	if _, noted := s.used[g]; noted {
		return false
	}
	s.used[g] = now
	return true
}
