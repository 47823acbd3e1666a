// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package prewarm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/template"
)

// formatter formats with the node's own mkfs, and notes what it was asked for.
type formatter struct {
	fingerprint string
	budget      int64 // of all templates

	mu    sync.Mutex
	full  bool            // the pool, as it were
	fails map[string]bool // by spec
	asked []string
}

func (f *formatter) format(_ context.Context, file *os.File, spec diskfs.Spec) (template.Provenance, error) {
	f.mu.Lock()
	f.asked = append(f.asked, spec.String())
	fails, full := f.fails[spec.String()], f.full
	f.mu.Unlock()
	if full {
		return template.Provenance{}, pool.ErrFull
	}
	fs, err := diskfs.Lookup(spec.Filesystem)
	if err == nil && fails {
		err = errors.New("no luck")
	}
	if err == nil {
		err = file.Truncate(spec.Size)
	}
	if err != nil {
		return template.Provenance{}, err
	}
	cmd := exec.Command(fs.Mkfs, fs.MkfsArgs("/proc/self/fd/3", spec.Label, spec.Options)...)
	cmd.ExtraFiles = []*os.File{file}
	if out, err := cmd.CombinedOutput(); err != nil {
		return template.Provenance{}, fmt.Errorf("%w: %s", err, out)
	}
	sb, err := fs.Identify(file)
	if err != nil {
		return template.Provenance{}, err
	}
	return template.Provenance{Fingerprint: f.fingerprint, UUID: sb.UUID.String()}, file.Sync()
}

// did returns what was formatted since the last call.
func (f *formatter) did() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	asked := strings.Join(f.asked, ", ")
	f.asked = nil
	return asked
}

func (f *formatter) store(t *testing.T, p *pool.Pool) *template.Store {
	t.Helper()
	s := template.NewStore(template.Config{
		Pool: p, Format: f.format, Fingerprint: func(diskfs.Spec) (string, error) { return f.fingerprint, nil },
		BuildsPerHour: 100, Budget: func() (int64, error) { return f.budget, nil },
	})
	t.Cleanup(s.Close)
	return s
}

func newPool(t *testing.T, kind testenv.Kind) *pool.Pool {
	t.Helper()
	p, err := pool.Open(t.Context(), pool.Config{Dir: filepath.Join(kind.Pool(t), "pool")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

// steps works until there is nothing to do at the moment.
func steps(t *testing.T, p *Prewarmer) {
	t.Helper()
	for p.step(t.Context()) {
	}
}

func did(t *testing.T, f *formatter, want string) {
	t.Helper()
	if got := f.did(); got != want {
		t.Errorf("built %q, want %q", got, want)
	}
}

// TestListed builds what is listed, in order, and follows a ConfigMap.
func TestListed(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			f := &formatter{fingerprint: "000000000000000a", budget: 100 << 20, fails: map[string]bool{"ext4 62Mi": true}}
			s := f.store(t, newPool(t, kind))
			m := &configMap{t, t.TempDir(), 0}
			m.replace("ext4:62Mi\next4:60Mi # the same as before\nnonsense\next4:63Mi\n")
			c := Config{
				Templates: s, Wait: true, File: filepath.Join(m.dir, "templates"),
				Specs: []diskfs.Spec{specOf(t, "ext4:61Mi:label=l"), specOf(t, "ext4:60Mi")},
			}
			p := New(c)
			all := "ext4 61Mi label=l, ext4 60Mi, ext4 62Mi, ext4 63Mi"
			if pending := p.Pending(); len(pending) != 1 || !strings.Contains(pending[0].Text, all) {
				t.Errorf("pending is %v", pending)
			}
			steps(t, p)
			did(t, f, all)
			if pending := p.Pending(); len(pending) != 0 {
				t.Errorf("all were tried, and pending is %v", pending)
			}
			var failed []string
			for _, c := range p.Conditions() {
				failed = append(failed, strings.TrimPrefix(c.Object, m.dir))
			}
			if got, want := fmt.Sprint(failed), "[/templates:3 ext4 62Mi]"; got != want || p.Counts() != (Counts{There: 3, Failing: 1}) {
				t.Errorf("conditions are of %s, want %s; counts are %+v", got, want, p.Counts())
			}

			m.replace("ext4:64Mi\n")
			p.look()
			if pending := p.Pending(); len(pending) != 0 {
				t.Errorf("one was listed later, and pending is %v", pending)
			}
			steps(t, p)
			did(t, f, "ext4 64Mi")
			if found := p.Conditions(); len(found) != 0 || p.Counts() != (Counts{There: 3}) {
				t.Errorf("conditions %v, counts %+v", found, p.Counts())
			}

			// What is gone, or failed, is tried again when its time has come.
			m.replace("ext4:62Mi\next4:64Mi\n")
			steps(t, p)
			did(t, f, "ext4 62Mi")
			gone, err := s.Ensure(t.Context(), specOf(t, "ext4:64Mi"))
			if err == nil {
				_, err = s.Remove(gone.Key)
				err = errors.Join(err, gone.Close())
			}
			if err != nil {
				t.Fatal(err)
			}
			p.findGone()
			steps(t, p)
			did(t, f, "")
			if p.Counts() != (Counts{There: 2, Failing: 2}) {
				t.Errorf("counts %+v", p.Counts())
			}
			f.fails = nil
			for _, l := range p.list {
				l.again = l.again.Add(-firstPause)
			}
			steps(t, p)
			did(t, f, "ext4 62Mi, ext4 64Mi")
			if found := p.Conditions(); len(found) != 0 || p.Counts() != (Counts{There: 4}) {
				t.Errorf("conditions %v, counts %+v", found, p.Counts())
			}

			// Another process finds all of them.
			p = New(c)
			steps(t, p)
			did(t, f, "")
			if p.Counts() != (Counts{There: 4}) {
				t.Errorf("counts %+v", p.Counts())
			}
		})
	}
}

// TestListedStays has room for two templates. The listed one stays, though it was used least recently.
func TestListedStays(t *testing.T) {
	p := newPool(t, testenv.XFS)
	f := &formatter{fingerprint: "000000000000000a", budget: 100 << 20}
	s := f.store(t, p)
	steps(t, New(Config{Templates: s, Specs: []diskfs.Spec{specOf(t, "ext4:64Mi")}}))
	ask := func(mib int) {
		t.Helper()
		tmpl, err := s.Ensure(t.Context(), specOf(t, fmt.Sprintf("ext4:%dMi", mib)))
		if err == nil {
			err = tmpl.Close()
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	ask(63)
	all, err := s.List()
	if err != nil {
		t.Fatal(err)
	}
	f.budget = 0
	for i, tmpl := range all { // of 63 MiB, and the listed one
		f.budget += tmpl.Takes
		if err := p.Touch(tmpl.Key, time.Now().Add(time.Duration(-1-i)*time.Hour)); err != nil {
			t.Fatal(err)
		}
	}
	ask(62)
	keys, err := p.Templates()
	if want := []string{"ext4-62m-000000000000000a", "ext4-64m-000000000000000a"}; err != nil || !slices.Equal(keys, want) {
		t.Errorf("the pool has %q, want %q: %v", keys, want, err)
	}
}

// TestChangedFormatter builds anew what was used lately, the latest first, behind what is listed.
func TestChangedFormatter(t *testing.T) {
	p := newPool(t, testenv.XFS)
	f := &formatter{fingerprint: "000000000000000a", budget: 100 << 20}
	old := f.store(t, p)
	for i, used := range []time.Duration{time.Hour, 8 * 24 * time.Hour, 6 * 24 * time.Hour, 2 * time.Hour} {
		tmpl, err := old.Ensure(t.Context(), specOf(t, fmt.Sprintf("ext4:%dMi", 61+i)))
		if err == nil {
			err = errors.Join(p.Touch(tmpl.Key, time.Now().Add(-used)), tmpl.Close())
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	f.did()
	run := func(specs ...diskfs.Spec) {
		t.Helper()
		prewarmer := New(Config{Templates: f.store(t, p), Specs: specs})
		prewarmer.findOutdated()
		steps(t, prewarmer)
	}
	run()
	did(t, f, "") // nothing has changed
	f.fingerprint, f.full = "000000000000000b", true
	run()
	did(t, f, "ext4 61Mi") // the others would find no space either
	f.full = false
	f.fails = map[string]bool{"ext4 64Mi": true}
	run(specOf(t, "ext4:70Mi"))
	did(t, f, "ext4 70Mi, ext4 61Mi, ext4 64Mi, ext4 63Mi")
	f.fails = nil
	run()
	did(t, f, "ext4 64Mi")
	run()
	did(t, f, "")
}

// TestRun has templates built in the background, until it is stopped in the middle.
func TestRun(t *testing.T) {
	p := newPool(t, testenv.XFS)
	f := &formatter{fingerprint: "000000000000000a", budget: 100 << 20}
	s := f.store(t, p)
	prewarmer := New(Config{Templates: s, Specs: []diskfs.Spec{specOf(t, "ext4:61Mi"), specOf(t, "xfs:300Mi")}})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan bool)
	go func() {
		prewarmer.Run(ctx)
		close(done)
	}()
	testenv.Eventually(t, "both templates", func() bool { return prewarmer.Counts() == Counts{There: 2} })
	keys, err := p.Templates()
	if want := []string{"ext4-61m-000000000000000a", "xfs-300m-000000000000000a"}; err != nil || !slices.Equal(keys, want) {
		t.Errorf("the pool has %q, want %q: %v", keys, want, err)
	}
	cancel()
	<-done
}
