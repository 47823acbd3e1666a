// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package golden

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/csi-disktemplate/csi-disktemplate/internal/plain"
	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/tmpfile"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
)

// goldens is the Store of a test.
type goldens struct {
	*Store
	t   *testing.T
	dir string // the pool's
}

// onPools runs a test on a pool of each kind of filesystem.
func onPools(t *testing.T, test func(t *testing.T, s goldens)) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			dir := filepath.Join(kind.Pool(t), "pool")
			p, err := pool.Open(t.Context(), pool.Config{Dir: dir})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { p.Close() })
			test(t, goldens{NewStore(p), t, dir})
		})
	}
}

// command is the Store of a command that runs beside the plugin.
func (s goldens) command() goldens {
	s.t.Helper()
	p, err := pool.OpenExisting(s.dir)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { p.Close() })
	return goldens{NewStore(p), s.t, s.dir}
}

// create opens an unnamed file with a content.
func (s goldens) create(content string) *os.File {
	s.t.Helper()
	f, err := s.New()
	if err == nil {
		s.t.Cleanup(func() { f.Close() })
		_, err = f.WriteString(content)
	}
	if err != nil {
		s.t.Fatal(err)
	}
	return f
}

// publish makes a generation, whose content is its golden and what was given.
func (s goldens) publish(n Name, content string) Generation {
	s.t.Helper()
	f := s.create(n.String() + " " + content)
	defer f.Close()
	g, err := s.Publish(f, Record{Namespace: n.Namespace, Name: n.Name, By: content})
	if err != nil {
		s.t.Fatal(err)
	}
	return g
}

// newest checks which generation is the newest one. 0 means that there is none.
func (s goldens) newest(n Name, number int, content string) {
	s.t.Helper()
	g, err := s.Newest(n)
	if number == 0 {
		s.notFound(err, fmt.Sprintf("golden %s has no generation on this node", n))
		return
	}
	if err != nil {
		s.t.Errorf("%s: %v", n, err)
		return
	}
	defer g.Close()
	if is := g.Record.Is(); is != (Generation{n, number}) {
		s.t.Errorf("the newest generation is %s, not %s@%d", is, n, number)
	}
	s.has(g.File, n.String()+" "+content)
}

func (s goldens) has(f *os.File, want string) {
	s.t.Helper()
	got, err := io.ReadAll(io.NewSectionReader(f, 0, 1<<20))
	if err != nil || string(got) != want {
		s.t.Errorf("it has %q, not %q: %v", got, want, err)
	}
}

func (s goldens) notFound(err error, says string) {
	s.t.Helper()
	if !errors.Is(err, errdefs.ErrNotFound) || !strings.HasPrefix(err.Error(), "not found: "+says) {
		s.t.Errorf("is told %v\nwant    not found: %s", err, says)
	}
}

func (s goldens) must(errs ...error) {
	s.t.Helper()
	if err := errors.Join(errs...); err != nil {
		s.t.Fatal(err)
	}
}

// listed compares the list with what should be there.
func (s goldens) listed(want ...Generation) {
	s.t.Helper()
	if list, err := s.List(); err != nil || !slices.Equal(list, want) {
		s.t.Errorf("there are %v, not %v: %v", list, want, err)
	}
}

// settle waits until an answer may be remembered.
func settle() { time.Sleep(clockTick + 20*time.Millisecond) }

var (
	ours  = Name{"ci", "go"}
	other = Name{"ci", "go-mod"}
	open  = Name{"", "go"}
)

// TestPublish makes generations, and finds all that was said of them.
func TestPublish(t *testing.T) {
	onPools(t, func(t *testing.T, s goldens) {
		s.listed()
		s.newest(ours, 0, "")
		began := time.Now()
		f := s.create("ci/go first")
		r := Record{
			Namespace: "ci", Name: "go", Spec: diskfs.Spec{Filesystem: "ext4", Size: 1 << 30}, UUID: uuid.New(),
			Created: began.UTC(), Volume: "csi-1", By: "pod ci/job",
		}
		first, err := s.Publish(f, r)
		s.must(err, f.Close())
		if first != (Generation{ours, 1}) {
			t.Errorf("the first is %s", first)
		}
		if g := s.publish(ours, "second"); g != (Generation{ours, 2}) {
			t.Errorf("the second is %s", g)
		}
		s.publish(other, "x")
		s.publish(open, "y")
		s.newest(ours, 2, "second")
		s.newest(other, 1, "x")
		s.newest(open, 1, "y")
		s.newest(Name{"other", "go"}, 0, "")
		s.listed(Generation{open, 1}, first, Generation{ours, 2}, Generation{other, 1})

		g, err := s.Open(first)
		s.must(err)
		defer g.Close()
		s.has(g.File, "ci/go first")
		r.Version, r.Generation = recordVersion, 1
		if fmt.Sprintf("%+v", g.Record) != fmt.Sprintf("%+v", r) {
			t.Errorf("its record is\n%+v, not\n%+v", g.Record, r)
		}
		all, err := s.Held()
		s.must(err)
		for _, h := range all {
			if h.Bytes <= 0 || h.Used.Before(began.Add(-time.Second)) || h.Used.After(time.Now().Add(time.Second)) {
				t.Errorf("held %+v", h)
			}
		}
		if len(all) != 4 || all[1].Generation != first {
			t.Errorf("held are %+v", all)
		}
		if strange, err := s.Strange(); len(strange) > 0 || err != nil {
			t.Errorf("strange are %q: %v", strange, err)
		}
	})
}

// TestPublishAtOnce makes generations of one golden from two processes at once. Each gets a number of its own.
func TestPublishAtOnce(t *testing.T) {
	onPools(t, func(t *testing.T, s goldens) {
		const before, each = 3, 8
		stores := []goldens{s, s.command()}
		for range before {
			s.publish(ours, "before")
		}
		settle()
		s.newest(ours, before, "before") // which is remembered
		var mu sync.Mutex
		var numbers []int
		contents := map[int]string{}
		var wait sync.WaitGroup
		for i := range 2 * each {
			content := fmt.Sprint(i)
			f := s.create(ours.String() + " " + content)
			wait.Go(func() {
				g, err := stores[i%2].Publish(f, Record{Namespace: ours.Namespace, Name: ours.Name})
				mu.Lock()
				defer mu.Unlock()
				if err != nil {
					t.Error(err)
				}
				numbers = append(numbers, g.Number)
				contents[g.Number] = content
			})
			wait.Go(func() { // somebody starts from it meanwhile
				if g, err := stores[(i+1)%2].Newest(ours); err == nil {
					g.Close()
				} else if !errors.Is(err, errdefs.ErrNotFound) {
					t.Error(err)
				}
			})
		}
		wait.Wait()
		slices.Sort(numbers)
		for i, number := range numbers {
			if number != before+i+1 {
				t.Fatalf("the numbers are %v", numbers)
			}
		}
		const last = before + 2*each
		s.newest(ours, last, contents[last])
	})
}

// TestFailedPublish fails to make generations while others are made, which all stay.
func TestFailedPublish(t *testing.T) {
	onPools(t, func(t *testing.T, s goldens) {
		// "olddirfd [...] and its link count is zero": linkat(2), ENOENT.
		path := filepath.Join(s.dir, "gone")
		gone, err := os.Create(path)
		s.must(err, os.Remove(path))
		defer gone.Close()
		failing := s.command()
		done := make(chan struct{})
		var wait sync.WaitGroup
		for range 4 {
			wait.Go(func() {
				for {
					select {
					case <-done:
						return
					default:
					}
					g, err := failing.Publish(gone, Record{Namespace: ours.Namespace, Name: ours.Name})
					if !errors.Is(err, os.ErrNotExist) {
						t.Errorf("%s: %v", g, err)
					}
				}
			})
		}
		var want []Generation
		for i := range 1000 {
			g := Generation{ours, i + 1}
			f := s.create("")
			s.must(tmpfile.Link(f, s.pool.Golden(g.file())), f.Close())
			want = append(want, g)
			time.Sleep(time.Millisecond) // the others see that one
		}
		close(done)
		wait.Wait()
		s.listed(want...)
	})
}

// TestNewestNotices has a command publish and remove beside the plugin, which remembers what there was.
func TestNewestNotices(t *testing.T) {
	onPools(t, func(t *testing.T, s goldens) {
		command := s.command()
		pause := settle
		for round := range 2 {
			s.newest(ours, 0, "")
			pause()
			s.newest(ours, 0, "")
			command.publish(ours, "first")
			s.newest(ours, 1, "first")
			pause()
			s.newest(ours, 1, "first")
			if s.remembers() != (round == 0) {
				t.Errorf("round %d: what there is is remembered: %v", round, s.remembers())
			}
			command.publish(ours, "second")
			s.newest(ours, 2, "second")
			pause()
			s.newest(ours, 2, "second")
			s.must(command.Remove(Generation{ours, 2}))
			s.newest(ours, 1, "first")
			pause()
			s.newest(ours, 1, "first")
			s.must(command.Remove(Generation{ours, 1}), command.Remove(Generation{ours, 1}))
			s.newest(ours, 0, "")
			pause = func() {} // all within one tick of the clock
		}
	})
}

func (s goldens) remembers() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.index != nil
}

// TestForgets finds out that all are gone although a change went unnoticed, as after the clock was set back.
func TestForgets(t *testing.T) {
	onPools(t, func(t *testing.T, s goldens) {
		first := s.publish(ours, "first")
		settle()
		s.newest(ours, 1, "first")
		s.must(s.command().Remove(first))
		is, err := s.pool.GoldensChanged()
		s.must(err)
		s.mu.Lock()
		s.seen = is
		s.mu.Unlock()
		s.newest(ours, 0, "")
	})
}

// TestTorn skips generations whose content a power cut took, with a record or without.
func TestTorn(t *testing.T) {
	onPools(t, func(t *testing.T, s goldens) {
		torn := func(number int, record bool) Generation {
			t.Helper()
			g := Generation{ours, number}
			f := s.create("")
			if record {
				s.must(pool.SetRecord(f, pool.VolumeAttr, Record{Version: 1, Namespace: "ci", Name: "go", Generation: number}))
			}
			s.must(tmpfile.Link(f, s.pool.Golden(g.file())))
			return g
		}
		first := torn(1, false)
		s.newest(ours, 0, "")
		whole := s.publish(ours, "whole")
		if whole.Number != 2 {
			t.Errorf("%s comes after a torn one", whole)
		}
		both := []Generation{first, torn(3, true), torn(4, false)}
		s.newest(ours, 2, "whole")
		settle()
		s.newest(ours, 2, "whole")
		for _, g := range both {
			_, err := s.Open(g)
			s.notFound(err, fmt.Sprintf("golden %s: a power cut took its content", g))
			if is, err := s.Torn(g); !is || err != nil {
				t.Errorf("%s is torn: %v, %v", g, is, err)
			}
		}
		for _, g := range []Generation{whole, {ours, 9}} {
			if is, err := s.Torn(g); is || err != nil {
				t.Errorf("%s is torn: %v, %v", g, is, err)
			}
		}
		s.must(s.Remove(whole))
		s.newest(ours, 0, "")
		if g := s.publish(ours, "more"); g.Number != 5 {
			t.Errorf("%s comes after torn ones", g)
		}
	})
}

// TestStrangers has files among the goldens that the plugin did not make.
func TestStrangers(t *testing.T) {
	onPools(t, func(t *testing.T, s goldens) {
		s.publish(ours, "first")
		at := func(name string) string { return s.pool.Golden(name) }
		strange := []string{"README", "ci.go", "ci.go.01", "ci.go.2.bak"}
		for _, name := range append(strange, ".ci.go.3.new") {
			s.must(os.WriteFile(at(name), []byte("x"), 0o600))
		}
		s.listed(Generation{ours, 1})
		s.newest(ours, 1, "first")
		if got, err := s.Strange(); err != nil || !slices.Equal(got, strange) {
			t.Errorf("strange are %q, not %q: %v", got, strange, err)
		}

		refused := func(name string, says string) {
			t.Helper()
			g, ok := ofFile(name)
			_, err := s.Open(g)
			_, newest := s.Newest(g.Name)
			if !ok || !errors.Is(err, errdefs.ErrState) || !errors.Is(newest, errdefs.ErrState) || !strings.Contains(err.Error(), says) {
				t.Errorf("%s is told %v, %v, want %s", name, err, newest, says)
				return
			}
			for _, fault := range plain.Faults(err.Error()) {
				t.Errorf("%s: %v", fault, err)
			}
		}
		s.must(os.WriteFile(at("ci.file.1"), []byte("x"), 0o600))
		refused("ci.file.1", "the file is not one of ours: move it away")
		s.must(os.Symlink(at("ci.go.1"), at("ci.link.1")))
		refused("ci.link.1", "ci.link.1")
		s.must(os.Mkdir(at("ci.dir.1"), 0o700))
		refused("ci.dir.1", "ci.dir.1")
		if is, err := s.Torn(Generation{Name{"ci", "dir"}, 1}); is || err != nil {
			t.Errorf("a directory is torn: %v, %v", is, err)
		}
		s.must(os.Link(at("ci.go.1"), at("ci.moved.1")))
		refused("ci.moved.1", "its record has version 1 and is of golden ci/go@1, and this plugin reads version 1")
		f := s.create("x")
		s.must(pool.SetRecord(f, pool.VolumeAttr, Record{Version: 2, Namespace: "ci", Name: "new", Generation: 1}),
			tmpfile.Link(f, at("ci.new.1")))
		refused("ci.new.1", "its record has version 2 and is of golden ci/new@1, and this plugin reads version 1; upgrade the plugin")
		s.newest(ours, 1, "first")
	})
}

// TestOlderStays reads a generation that was removed, and was open.
func TestOlderStays(t *testing.T) {
	onPools(t, func(t *testing.T, s goldens) {
		first := s.publish(ours, "first")
		g, err := s.Newest(ours)
		s.must(err)
		defer g.Close()
		s.publish(ours, "second")
		s.must(s.Remove(first), s.Remove(first))
		s.has(g.File, "ci/go first")
		s.newest(ours, 2, "second")
		_, err = s.Open(first)
		s.notFound(err, "there is no golden ci/go@1 on this node")
		_, err = s.Look(first)
		s.notFound(err, "there is no golden ci/go@1 on this node")
	})
}

// TestTouch moves the time of use, and nothing else.
func TestTouch(t *testing.T) {
	onPools(t, func(t *testing.T, s goldens) {
		g := s.publish(ours, "first")
		path := s.pool.Golden(g.file())
		long := time.Now().Add(-48 * time.Hour).Truncate(time.Second)
		s.must(os.Chtimes(path, time.Time{}, long))
		before, err := s.Look(g)
		s.must(err)
		if !before.Used.Equal(long) {
			t.Errorf("it was used %s, not %s", before.Used, long)
		}
		began := time.Now()
		s.Touch(g)
		after, err := s.Look(g)
		s.must(err)
		if after.Used.Before(began.Add(-time.Second)) || after.Bytes != before.Bytes || after.Generation != g {
			t.Errorf("it was %+v, and is %+v", before, after)
		}
		s.newest(ours, 1, "first")
		out := testenv.CaptureLog(t, "9")
		s.Touch(Generation{ours, 7})
		if out.String() != "" {
			t.Errorf("logged %s", out)
		}
	})
}

// TestOlderPool has no goldens at all: a command looks at a pool that no plugin of this version has opened.
func TestOlderPool(t *testing.T) {
	onPools(t, func(t *testing.T, s goldens) {
		s.must(os.Remove(filepath.Join(s.dir, "goldens")))
		old := s.command()
		old.listed()
		old.newest(ours, 0, "")
		if all, err := old.Held(); len(all) > 0 || err != nil {
			t.Errorf("%v %v", all, err)
		}
	})
}
