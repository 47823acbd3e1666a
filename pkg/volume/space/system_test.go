// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package space

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"k8s.io/klog/v2"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

const (
	mib = 1 << 20
	gib = 1 << 30
)

// space is the Space of a test, with its pool and its images.
type space struct {
	*Space
	t *testing.T
}

func onPools(t *testing.T, test func(s space)) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			p, err := pool.Open(t.Context(), pool.Config{Dir: filepath.Join(kind.Mount(t, 4*gib), "pool")})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { p.Close() })
			test(opened(t, p))
		})
	}
}

// opened is the Space of a plugin that begins to work on a pool.
func opened(t *testing.T, p *pool.Pool) space {
	t.Helper()
	s, err := New(p, image.NewStore(p), Config{})
	if err != nil {
		t.Fatal(err)
	}
	return space{s, t}
}

// describe makes an image that has no name yet.
func (s space) describe(id string, bytes int64, l image.Lifecycle) *image.Image {
	s.t.Helper()
	f, err := s.images.New()
	if err == nil {
		err = s.images.Extend(image.Thin, f, bytes)
	}
	var img *image.Image
	if err == nil {
		img, err = s.images.Describe(f, image.Record{ID: id, Lifecycle: l, Mode: image.ModeBlock, Spec: diskfs.Spec{Filesystem: "raw", Size: bytes}})
	}
	if err != nil {
		s.t.Fatal(err)
	}
	return img
}

// create makes a claim as the plugin does.
func (s space) create(id string, bytes int64) error {
	release, err := s.Admit(Claim(image.VolumeKey(id), bytes, image.Thin))
	if err != nil {
		return err
	}
	defer release()
	img := s.describe(id, bytes, image.Claim)
	defer img.Close()
	return s.images.Publish(img)
}

// named gives an image its name behind the plugin's back.
func (s space) named(id string, bytes int64, l image.Lifecycle) {
	s.t.Helper()
	img := s.describe(id, bytes, l)
	defer img.Close()
	if err := s.images.Link(img); err != nil {
		s.t.Fatal(err)
	}
}

// sum is what has been promised.
func (s space) sum() held {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.sums.total
}

// mustPromise compares the sums with what should be promised, and with those of a plugin that
// begins to work.
func (s space) mustPromise(what string, thin int64) {
	s.t.Helper()
	if got := s.sum().thin; got != thin {
		s.t.Errorf("%s: %d MiB are promised, not %d", what, got/mib, thin/mib)
	}
	if got := opened(s.t, s.pool).sum().thin; got != thin {
		s.t.Errorf("%s: at a start %d MiB are promised, not %d", what, got/mib, thin/mib)
	}
}

func (s space) must(what string, errs ...error) {
	s.t.Helper()
	if err := errors.Join(errs...); err != nil {
		s.t.Fatalf("%s: %v", what, err)
	}
}

// recounted recounts, and returns what that has logged.
func (s space) recounted() string {
	s.t.Helper()
	out := testenv.CaptureLog(s.t, "0")
	s.must("recounting", s.Recount())
	klog.Flush()
	return out.String()
}

// TestSumsFollow makes, resizes and removes claims. The sums follow at each step, and there is
// nothing to correct.
func TestSumsFollow(t *testing.T) {
	onPools(t, func(s space) {
		s.must("creating", s.create("a", 100*mib), s.create("b", 200*mib))
		s.mustPromise("two claims", 300*mib)
		s.named("inline", 50*mib, image.Inline)
		s.mustPromise("an inline volume beside them", 300*mib)
		img, err := s.images.OpenClaim("a")
		s.must("opening", err)
		s.must("resizing", s.images.Resize(img, 150*mib), img.Close())
		s.mustPromise("one has grown", 350*mib)
		s.must("removing", s.images.RemoveDurably("b"), s.images.Remove("inline"))
		s.mustPromise("one is gone", 150*mib)
		if log := s.recounted(); log != "" {
			t.Errorf("recounting logs %s", log)
		}
		s.must("removing", s.images.Remove("a"))
		s.mustPromise("all are gone", 0)
	})
}

// TestWrongSumHeals changes images behind the plugin's back. The next count is right, and says
// what was wrong.
func TestWrongSumHeals(t *testing.T) {
	onPools(t, func(s space) {
		s.must("creating", s.create("kept", 100*mib), s.create("removed", 200*mib), s.create("larger", 300*mib))
		heals := func(what string, was, is int64, first string, images int) {
			t.Helper()
			if got := s.sum().thin; got != was {
				t.Errorf("%s: before it is counted, %d MiB are promised, not %d", what, got/mib, was/mib)
			}
			log := s.recounted()
			t.Log(log)
			for _, word := range []string{"W", "counted wrongly", fmt.Sprintf("images=%d", images), fmt.Sprintf("first=%q", first), fmt.Sprintf("thinIs=%q", size.Format(is))} {
				if !strings.Contains(log, word) {
					t.Errorf("%s: the log does not say %s: %s", what, word, log)
				}
			}
			if log := s.recounted(); log != "" {
				t.Errorf("%s: the second count logs %s", what, log)
			}
		}
		s.must("removing", os.Remove(s.pool.Volume("removed")))
		heals("an image is gone", 600*mib, 0, "volumes/removed", 1)
		s.mustPromise("an image is gone", 400*mib)

		s.named("added", 50*mib, image.Claim)
		heals("an image was added", 400*mib, 50*mib, "volumes/added", 1)
		s.mustPromise("an image was added", 450*mib)

		img, err := s.images.OpenClaim("larger")
		s.must("opening", err)
		img.Record.Spec.Size = 310 * mib
		s.must("changing the record", pool.SetRecord(img.File, pool.VolumeAttr, img.Record), img.Close(), os.Remove(s.pool.Volume("kept")))
		heals("several", 450*mib, 310*mib, "volumes/kept", 2)
		s.mustPromise("several", 360*mib)
		s.must("removing", s.images.Remove("larger"), s.images.Remove("added"))
	})
}

// TestCountingBesideChanges recounts all the time while images come, grow and go. That finds no
// mistakes, and makes none.
func TestCountingBesideChanges(t *testing.T) {
	onPools(t, func(s space) {
		out := testenv.CaptureLog(t, "0")
		stop, counted := make(chan struct{}), make(chan error)
		go func() {
			var err error
			for n := 0; ; n++ {
				select {
				case <-stop:
					t.Logf("counted %d times", n)
					counted <- err
					return
				default:
					err = errors.Join(err, s.Recount())
					_, e := s.measure(time.Now())
					err = errors.Join(err, e)
				}
			}
		}()
		var all sync.WaitGroup
		for i := range 8 {
			all.Go(func() {
				id := fmt.Sprint("v", i)
				for range 20 {
					err := s.create(id, 10*mib)
					var img *image.Image
					if err == nil {
						img, err = s.images.OpenClaim(id)
					}
					if err == nil {
						err = errors.Join(s.images.Resize(img, 20*mib), img.Close(), s.images.Remove(id))
					}
					if err != nil {
						t.Error(err)
					}
				}
			})
		}
		all.Wait()
		close(stop)
		s.must("counting", <-counted)
		klog.Flush()
		if out.Len() > 0 {
			t.Errorf("the log says %s", out)
		}
		if got := s.sum(); got != (held{}) || len(s.changes) > 0 || len(s.sums.making) > 0 {
			t.Errorf("nothing is there, and %+v is counted; %v, %v", got, s.changes, s.sums.making)
		}
	})
}

// TestNeverTooMuch asks for many claims at once, while all images are counted again and again.
// As many are made as fit, and no more.
func TestNeverTooMuch(t *testing.T) {
	onPools(t, func(s space) {
		left, err := s.Available(image.Thin)
		s.must("asking what is available", err)
		const fit = 7
		each := left / fit / mib * mib
		for round := range 3 {
			var mu sync.Mutex
			var made []string
			var all sync.WaitGroup
			for i := range 32 {
				all.Go(func() {
					id := fmt.Sprint("v", i)
					err := s.create(id, each-mib) // what the images' names take is others'
					if err != nil && !errors.Is(err, pool.ErrFull) {
						t.Error(err)
					}
					if i%8 == 0 {
						if err := s.Recount(); err != nil {
							t.Error(err)
						}
					}
					if err == nil {
						mu.Lock()
						defer mu.Unlock()
						made = append(made, id)
					}
				})
			}
			all.Wait()
			if len(made) != fit {
				t.Errorf("round %d: %d claims were made, and %d fit", round, len(made), fit)
			}
			for _, id := range made {
				s.must("removing", s.images.RemoveDurably(id))
			}
		}
	})
}

// TestLooks checks when all images are looked at: never for a demand that fits whatever they
// have, and before anything is refused.
func TestLooks(t *testing.T) {
	onPools(t, func(s space) {
		for i := range 3 {
			s.must("creating", s.create(fmt.Sprint("v", i), 100*mib))
		}
		if !s.measured.start.IsZero() {
			t.Error("all images were looked at for claims that fit in any case")
		}
		if a, err := s.Account(); err != nil || a.Promised != 300*mib || a.Left <= 0 {
			t.Errorf("the account is %+v, %v", a, err)
		}
		s.measured = measurement{} // forget that look

		// A claim has taken its space. Only a look tells that it is not somebody else's.
		f, err := os.OpenFile(s.pool.Volume("v0"), os.O_RDWR, 0)
		s.must("opening", err)
		_, err = f.WriteAt(make([]byte, 100*mib), 0)
		s.must("writing", err, f.Sync(), f.Close(), s.pool.Sync())
		left, err := s.Available(image.Thin)
		s.must("asking what is available", err)
		before := s.measured
		if before.start.IsZero() {
			t.Fatal("nobody has looked at the images")
		}
		s.must("creating what fits after a look", s.create("fits", left-20*mib))
		if s.measured.start.Equal(before.start) {
			t.Error("few images were not looked at again")
		}
		s.must("removing", s.images.RemoveDurably("fits"))

		// A measurement that is kept says that others take nearly everything. That is no longer so.
		s.mu.Lock()
		s.measured.images, s.measured.took, s.measured.others = few+1, time.Hour, used(s.measured.has)
		stale := s.measured
		s.mu.Unlock()
		if less, err := s.Available(image.Thin); err != nil || less > left-90*mib {
			t.Errorf("the kept measurement is not used: %d of %d MiB are available: %v", less/mib, left/mib, err)
		}
		if !s.measured.start.Equal(stale.start) {
			t.Error("the images were looked at although a measurement was kept")
		}
		s.must("creating what a new look allows", s.create("fits", left-20*mib))
		if s.measured.start.Equal(stale.start) {
			t.Error("a claim was made that did not fit")
		}
		s.must("removing", s.images.RemoveDurably("fits"))

		// It is refused for what is there at this moment, and with the figures of this moment.
		s.mu.Lock()
		s.measured.images, s.measured.took = few+1, time.Hour
		stale = s.measured
		s.mu.Unlock()
		err = s.create("too-large", left+100*mib)
		t.Log(err)
		if !errors.Is(err, pool.ErrFull) || s.measured.start.Equal(stale.start) {
			t.Errorf("refused without a look: %v", err)
		}
		for i := range 3 {
			s.must("removing", s.images.Remove(fmt.Sprint("v", i)))
		}
	})
}
