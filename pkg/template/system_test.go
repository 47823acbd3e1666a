// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package template

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/reflink"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
)

// Tests that need no VM format with the node's own mkfs, which makes a real filesystem in a few
// milliseconds.
var spec = diskfs.Spec{Filesystem: "ext4", Size: 64 << 20, Label: "t"}

const fp = "0123456789abcdef"

func mkfs(_ context.Context, f *os.File, spec diskfs.Spec) (Provenance, error) {
	fs, err := diskfs.Lookup(spec.Filesystem)
	if err != nil {
		return Provenance{}, err
	}
	if err := f.Truncate(spec.Size); err != nil {
		return Provenance{}, err
	}
	cmd := exec.Command(fs.Mkfs, fs.MkfsArgs("/proc/self/fd/3", spec.Label, spec.Options)...)
	cmd.ExtraFiles = []*os.File{f}
	if out, err := cmd.CombinedOutput(); err != nil {
		return Provenance{}, fmt.Errorf("%w: %s", err, out)
	}
	sb, err := fs.Identify(f)
	if err != nil {
		return Provenance{}, err
	}
	return Provenance{Fingerprint: fp, UUID: sb.UUID.String()}, f.Sync()
}

func newPool(t testing.TB, kind testenv.Kind) *pool.Pool {
	t.Helper()
	p, err := pool.Open(t.Context(), pool.Config{Dir: filepath.Join(kind.Pool(t), "pool")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

func newStore(t testing.TB, p *pool.Pool, change func(*Config)) *Store {
	t.Helper()
	c := Config{Pool: p, Fingerprint: func(diskfs.Spec) (string, error) { return fp, nil }, Format: mkfs}
	if change != nil {
		change(&c)
	}
	s := NewStore(c)
	t.Cleanup(s.Close)
	return s
}

func ensure(t testing.TB, s *Store, hit bool) *Template {
	t.Helper()
	tmpl, err := s.Ensure(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tmpl.Close() })
	if tmpl.Hit != hit {
		t.Errorf("Hit is %v, want %v", tmpl.Hit, hit)
	}
	return tmpl
}

// onlyTemplates checks that the pool's directory has these keys and nothing else: no staging
// file, no debris.
func onlyTemplates(t testing.TB, p *pool.Pool, want ...string) {
	t.Helper()
	keys, err := p.Templates()
	if err != nil || strings.Join(keys, " ") != strings.Join(want, " ") {
		t.Errorf("the pool has the templates %q, want %q: %v", keys, want, err)
	}
}

func TestEnsure(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			p := newPool(t, kind)
			s := newStore(t, p, nil)
			first := ensure(t, s, false)
			key := "ext4-64m-" + fp
			if first.Key != key || first.Spec.Label != "t" || first.Provenance.UUID == "" || first.Built.IsZero() || first.Digest == "" {
				t.Errorf("the record is %+v", first.Record)
			}
			onlyTemplates(t, p, key)
			ensure(t, s, true)
			ensure(t, newStore(t, p, nil), true) // another process
			attr := make([]byte, 4096)
			n, err := syscall.Getxattr(p.Template(key), "user.disktemplate", attr)
			if err != nil || !strings.Contains(string(attr[:n]), `"uuid":"`+first.Provenance.UUID) {
				t.Errorf("user.disktemplate is %q: %v", attr[:max(n, 0)], err)
			}
			testenv.Run(t, "e2fsck", "-fn", p.Template(key))
		})
	}
}

// TestCorruptIsRebuilt damages a published template in the ways that a disk or an operator may.
func TestCorruptIsRebuilt(t *testing.T) {
	write := func(off int64, b []byte) func(path string) error {
		return func(path string) error {
			f, err := os.OpenFile(path, os.O_RDWR, 0)
			if err != nil {
				return err
			}
			defer f.Close()
			_, err = f.WriteAt(b, off)
			return err
		}
	}
	for name, damage := range map[string]func(path string) error{
		"truncated":        func(path string) error { return os.Truncate(path, 1<<20) },
		"empty":            func(path string) error { return os.Truncate(path, 0) },
		"all zeros":        func(path string) error { return errors.Join(os.Truncate(path, 0), os.Truncate(path, spec.Size)) },
		"zeroed start":     write(0, make([]byte, 8192)),
		"flipped metadata": write(4096*3+100, []byte{0xff, 0xee}),
		"data in a hole":   write(40<<20, []byte("x")),
		"no record":        func(path string) error { return syscall.Removexattr(path, string(pool.TemplateAttr)) },
		"garbled record":   func(path string) error { return syscall.Setxattr(path, string(pool.TemplateAttr), []byte("{"), 0) },
		"newer record": func(path string) error {
			return syscall.Setxattr(path, string(pool.TemplateAttr), []byte(`{"version":99}`), 0)
		},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPool(t, testenv.XFS)
			s := newStore(t, p, nil)
			first := ensure(t, s, false)
			clone := filepath.Join(p.Root(), "clone")
			testenv.Run(t, "cp", "--reflink=always", p.Template(first.Key), clone)
			if err := damage(p.Template(first.Key)); err != nil {
				t.Fatal(err)
			}
			if _, err := s.Lookup(first.Key); !errors.Is(err, ErrCorrupt) {
				t.Errorf("Lookup: %v, want ErrCorrupt", err)
			} else {
				t.Log(err)
			}
			again := ensure(t, s, false)
			if again.Provenance.UUID == first.Provenance.UUID {
				t.Error("the template was not built again")
			}
			ensure(t, s, true)
			onlyTemplates(t, p, first.Key)
			testenv.Run(t, "e2fsck", "-fn", clone)
		})
	}
}

func TestNotAFile(t *testing.T) {
	p := newPool(t, testenv.XFS)
	s := newStore(t, p, nil)
	path := p.Template("ext4-64m-" + fp)
	for name, put := range map[string]func() error{
		"symlink":   func() error { return os.Symlink("/etc/passwd", path) },
		"fifo":      func() error { return syscall.Mkfifo(path, 0o600) },
		"directory": func() error { return os.Mkdir(path, 0o700) },
	} {
		if err := put(); err != nil {
			t.Fatal(err)
		}
		ensure(t, s, false)
		if err := os.Remove(path); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
	}
	if err := os.MkdirAll(filepath.Join(path, "sub"), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Ensure(t.Context(), spec); err == nil || !strings.Contains(err.Error(), "move it away") {
		t.Errorf("a directory with content in the way: %v, want an error that says what to do", err)
	}
}

func TestFailedFormatLeavesNothing(t *testing.T) {
	p := newPool(t, testenv.XFS)
	boom := errors.New("boom")
	var observed error
	s := newStore(t, p, func(c *Config) {
		c.Format = func(_ context.Context, f *os.File, spec diskfs.Spec) (Provenance, error) {
			f.Truncate(spec.Size)
			return Provenance{}, boom
		}
		c.Observe = func(_ diskfs.Spec, _ time.Duration, err error) { observed = err }
	})
	if _, err := s.Ensure(t.Context(), spec); !errors.Is(err, boom) || !errors.Is(observed, boom) {
		t.Errorf("Ensure returned %v, Observe got %v, want boom for both", err, observed)
	}
	onlyTemplates(t, p)
	if l, err := p.TryLock("ext4-64m-" + fp); err != nil || l == nil {
		t.Errorf("the lock cannot be had: %v", err)
	} else {
		l.Unlock()
	}
}

// TestUnformattedIsRefused has a formatter that claims success and wrote nothing. By this defect
// all-zero images once were cached.
func TestUnformattedIsRefused(t *testing.T) {
	p := newPool(t, testenv.XFS)
	s := newStore(t, p, func(c *Config) {
		c.Format = func(_ context.Context, f *os.File, spec diskfs.Spec) (Provenance, error) {
			return Provenance{Fingerprint: fp}, f.Truncate(spec.Size)
		}
	})
	if _, err := s.Ensure(t.Context(), spec); !errors.Is(err, ErrCorrupt) {
		t.Errorf("%v, want ErrCorrupt", err)
	}
	onlyTemplates(t, p)
}

func TestFormatterChangedMeanwhile(t *testing.T) {
	p := newPool(t, testenv.XFS)
	s := newStore(t, p, func(c *Config) {
		c.Fingerprint = func(diskfs.Spec) (string, error) { return "another-one", nil }
	})
	if _, err := s.Ensure(t.Context(), spec); !errors.Is(err, ErrChanged) {
		t.Errorf("%v, want ErrChanged", err)
	}
	onlyTemplates(t, p)
}

// TestBuildOutlivesCaller lets the first caller give up. The second one finds the build that the
// first began.
func TestBuildOutlivesCaller(t *testing.T) {
	p := newPool(t, testenv.XFS)
	proceed := make(chan struct{})
	var builds atomic.Int32
	s := newStore(t, p, func(c *Config) {
		c.Format = func(ctx context.Context, f *os.File, spec diskfs.Spec) (Provenance, error) {
			builds.Add(1)
			select {
			case <-proceed:
			case <-ctx.Done(): // the test failed
			}
			return mkfs(ctx, f, spec)
		}
	})
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	_, err := s.Ensure(ctx, spec)
	const want = "template ext4 64Mi label=t is being built; Kubernetes will ask again"
	if !errors.Is(err, ErrBuilding) || ctx.Err() != nil || err.Error() != want {
		t.Fatalf("%v, want %s, ahead of the deadline", err, want)
	}
	// A caller that gives up itself reads nothing. The log has its reason.
	given, giveUp := context.WithCancelCause(t.Context())
	giveUp(errors.New("gave up"))
	if _, err := s.Ensure(given, spec); !errors.Is(err, ErrBuilding) || !strings.Contains(err.Error(), "gave up") {
		t.Errorf("%v, want ErrBuilding with the caller's reason", err)
	}
	close(proceed)
	testenv.Eventually(t, "the build", func() bool {
		keys, err := p.Templates()
		return err == nil && len(keys) == 1
	})
	ensure(t, s, true)
	if builds.Load() != 1 {
		t.Errorf("%d builds, want 1", builds.Load())
	}
}

// TestWaitsFor has four builds for two slots, and asks what each waits for.
func TestWaitsFor(t *testing.T) {
	p := newPool(t, testenv.XFS)
	proceed := make(chan struct{})
	var slow atomic.Bool
	s := newStore(t, p, func(c *Config) {
		c.Format = func(ctx context.Context, f *os.File, spec diskfs.Spec) (Provenance, error) {
			if slow.Load() {
				select {
				case <-proceed:
				case <-ctx.Done(): // the test failed
				}
			}
			return mkfs(ctx, f, spec)
		}
	})
	have(t, s, 60) // it takes some ms, and is the mean
	slow.Store(true)
	mustWait := func(mib int64, says ...string) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err := s.Ensure(ctx, sized(mib))
		if !errors.Is(err, ErrBuilding) || ctx.Err() != nil {
			t.Fatalf("%v, want ErrBuilding ahead of the deadline", err)
		}
		t.Log(err)
		for _, w := range append(says, fmt.Sprintf("template ext4 %dMi is ", mib), "; Kubernetes will ask again") {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("does not say %q: %v", w, err)
			}
		}
		if strings.Contains(err.Error(), fmt.Sprint(os.Getpid())) || strings.Contains(err.Error(), "deadline") {
			t.Errorf("names this process, or what the caller knows: %v", err)
		}
	}
	mustWait(61, "is being built") // TestQueue checks what is expected of it
	mustWait(62, "is being built")
	mustWait(63, "is queued behind 2 builds (about ")
	mustWait(64, "is queued behind 3 builds (about ")
	mustWait(65, "is queued behind 4 builds (about ")
	mustWait(63, "is queued behind 2 builds (about ") // the retry has the place of the first call

	// Another process holds the lock of the next one. It is the one to name.
	lockfile := filepath.Join(p.Root(), "locks", keyOf(66)+".lock")
	other := exec.CommandContext(t.Context(), "flock", lockfile, "sh", "-c", "echo locked; read line")
	hold, err := other.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := other.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, 7)); err != nil {
		t.Fatal(err)
	}
	mustWait(66, "is locked by pid=", "cmd=")
	if err := errors.Join(hold.Close(), out.Close()); err != nil {
		t.Error(err)
	}
	other.Wait() // sh has no line to read

	close(proceed)
	for mib := int64(61); mib <= 66; mib++ {
		tmpl, err := s.Ensure(t.Context(), sized(mib))
		if err != nil {
			t.Fatal(err)
		}
		tmpl.Close()
	}
	if len(s.queue.builds) > 0 {
		t.Errorf("remembers builds that ended: %v", s.queue.builds)
	}
}

func TestCloseEndsBuilds(t *testing.T) {
	p := newPool(t, testenv.XFS)
	s := NewStore(Config{Pool: p, Fingerprint: func(diskfs.Spec) (string, error) { return fp, nil },
		Format: func(ctx context.Context, _ *os.File, _ diskfs.Spec) (Provenance, error) {
			<-ctx.Done()
			return Provenance{}, ctx.Err()
		}})
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	s.Ensure(ctx, spec)
	s.Close()
	onlyTemplates(t, p)
}

func TestLockHeldForEver(t *testing.T) {
	p := newPool(t, testenv.XFS)
	s := newStore(t, p, func(c *Config) { c.LockTimeout = 200 * time.Millisecond })
	held, err := p.Lock(t.Context(), "ext4-64m-"+fp)
	if err != nil {
		t.Fatal(err)
	}
	_, err = s.Ensure(t.Context(), spec)
	if !errors.Is(err, pool.ErrLocked) || !strings.Contains(err.Error(), fmt.Sprintf("pid=%d", os.Getpid())) {
		t.Errorf("%v, want ErrLocked with the holder's pid", err)
	}
	held.Unlock()
	tmpl := ensure(t, s, false)
	// A hit, a clone and a lookup never take the lock.
	held, err = p.Lock(t.Context(), tmpl.Key)
	if err != nil {
		t.Fatal(err)
	}
	defer held.Unlock()
	ensure(t, s, true)
}

// TestOpenTemplateSurvivesRemoval clones from an open template whose name has been removed.
func TestOpenTemplateSurvivesRemoval(t *testing.T) {
	p := newPool(t, testenv.XFS)
	s := newStore(t, p, nil)
	tmpl := ensure(t, s, false)
	if removed, err := s.Remove(tmpl.Key); !removed || err != nil {
		t.Errorf("the template was removed: %v, %v", removed, err)
	}
	dst, err := p.NewVolume()
	if err != nil {
		t.Fatal(err)
	}
	defer dst.Close()
	if err := reflink.Clone(dst, tmpl.File); err != nil {
		t.Fatal(err)
	}
	a, errA := digest(dst)
	if errA != nil || a != tmpl.Digest {
		t.Errorf("the clone has the digest %s, the template %s: %v", a, tmpl.Digest, errA)
	}
}

// TestCleanAll lists and removes templates, as the command clean-all does.
func TestCleanAll(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			p := newPool(t, kind)
			s := newStore(t, p, nil)
			if all, err := s.List(); len(all) != 0 || err != nil {
				t.Errorf("an empty pool has %+v: %v", all, err)
			}
			tmpl := ensure(t, s, false)
			list := func() Cached {
				t.Helper()
				all, err := s.List()
				if err != nil || len(all) != 1 {
					t.Fatalf("the templates are %+v: %v", all, err)
				}
				return all[0]
			}
			is := list()
			if is.Key != tmpl.Key || is.Filesystem != spec.Filesystem || is.Size != spec.Size || is.Holder != "" || time.Since(is.Used) > time.Minute ||
				is.Takes < 64<<10 || is.Takes > spec.Size || is.Frees > is.Takes || is.Frees < is.Takes-4096 { // a block may hold the record
				t.Errorf("the template is %+v", is)
			}
			clone, err := p.NewVolume()
			if err != nil {
				t.Fatal(err)
			}
			defer clone.Close()
			if err := reflink.Clone(clone, tmpl.File); err != nil {
				t.Fatal(err)
			}
			// A clone on xfs leaves out what the source has preallocated and not written.
			if shared := list(); shared.Takes != is.Takes || shared.Frees > is.Frees/2 || kind.Name == "btrfs" && shared.Frees != 0 {
				t.Errorf("with a clone the template is %+v", shared)
			}
			held, err := p.Lock(t.Context(), tmpl.Key)
			if err != nil {
				t.Fatal(err)
			}
			if is := list(); !strings.Contains(is.Holder, fmt.Sprintf("pid=%d", os.Getpid())) {
				t.Errorf("the holder is %q", is.Holder)
			}
			if removed, err := s.Remove(tmpl.Key); removed || err != nil {
				t.Errorf("a locked template was removed: %v, %v", removed, err)
			}
			held.Unlock()
			if removed, err := s.Remove(tmpl.Key); !removed || err != nil {
				t.Errorf("the template was removed: %v, %v", removed, err)
			}
			if removed, err := s.Remove("../volumes/v"); removed || err == nil {
				t.Errorf("no template was removed: %v, %v", removed, err)
			}
			onlyTemplates(t, p)
			if _, err := os.Stat(filepath.Join(p.Root(), "locks", tmpl.Key+".lock")); err != nil {
				t.Errorf("the lockfile was removed: %v", err)
			}
			ensure(t, s, false)
		})
	}
}

// TestWarmCacheServes has a template, and no formatter any more.
func TestWarmCacheServes(t *testing.T) {
	p := newPool(t, testenv.XFS)
	old := ensure(t, newStore(t, p, nil), false)
	gone := errors.New("mkfs.ext4 is gone")
	s := newStore(t, p, func(c *Config) {
		c.Fingerprint = func(diskfs.Spec) (string, error) { return "", gone }
	})
	if tmpl := ensure(t, s, true); tmpl.Key != old.Key {
		t.Errorf("Ensure returned %s, want %s", tmpl.Key, old.Key)
	}
	cannotMake(t, s, gone)
}

// TestQEMUGone has a formatter that knows its fingerprint and cannot run.
func TestQEMUGone(t *testing.T) {
	p := newPool(t, testenv.XFS)
	old := ensure(t, newStore(t, p, nil), false)
	gone := errors.New("formatter unavailable: no qemu")
	s := newStore(t, p, func(c *Config) {
		c.Fingerprint = func(diskfs.Spec) (string, error) { return "fedcba9876543210", nil }
		c.Format = func(context.Context, *os.File, diskfs.Spec) (Provenance, error) {
			return Provenance{}, NoFormatter(gone)
		}
	})
	if tmpl := ensure(t, s, true); tmpl.Key != old.Key {
		t.Errorf("Ensure returned %s, want %s", tmpl.Key, old.Key)
	}
	cannotMake(t, s, gone)
}

// cannotMake checks what a pod reads whose template is not there and cannot be built: what it
// asked for, and why it cannot have it, each of them once.
func cannotMake(t *testing.T, s *Store, gone error) {
	t.Helper()
	other := spec
	other.Label = "other"
	_, err := s.Ensure(t.Context(), other)
	if !errors.Is(err, ErrNoFormatter) || !errors.Is(err, gone) {
		t.Fatalf("other content: %v, want ErrNoFormatter and its cause", err)
	}
	if want := fmt.Sprintf("this node cannot make a template of %s: %s", other, gone); err.Error() != want {
		t.Errorf("the message is\n%q, want\n%q", err, want)
	}
}

// TestMaxBuilds asks for many different templates at once.
func TestMaxBuilds(t *testing.T) {
	p := newPool(t, testenv.XFS)
	var now, most atomic.Int32
	s := newStore(t, p, func(c *Config) {
		c.MaxBuilds = 2
		c.Format = func(ctx context.Context, f *os.File, spec diskfs.Spec) (Provenance, error) {
			n := now.Add(1)
			defer now.Add(-1)
			for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
			}
			time.Sleep(20 * time.Millisecond)
			return mkfs(ctx, f, spec)
		}
	})
	var wg sync.WaitGroup
	for i := range 10 {
		wg.Go(func() {
			spec := diskfs.Spec{Filesystem: "ext4", Size: int64(64+i) << 20}
			tmpl, err := s.Ensure(t.Context(), spec)
			if err != nil {
				t.Error(err)
				return
			}
			tmpl.Close()
		})
	}
	wg.Wait()
	if most.Load() != 2 {
		t.Errorf("%d builds ran at once, want 2", most.Load())
	}
}

func TestInvalidSpecs(t *testing.T) {
	p := newPool(t, testenv.XFS)
	s := newStore(t, p, nil)
	for name, c := range map[string]struct {
		spec diskfs.Spec
		want error
	}{
		"size":       {diskfs.Spec{Filesystem: "ext4", Size: 1}, diskfs.ErrOutOfRange},
		"too large":  {diskfs.Spec{Filesystem: "ext4", Size: diskfs.MaxSize + diskfs.MiB}, diskfs.ErrOutOfRange},
		"filesystem": {diskfs.Spec{Filesystem: "ntfs", Size: 1 << 30}, diskfs.ErrUnknown},
		"raw":        {diskfs.Spec{Filesystem: "raw", Size: 1 << 30}, diskfs.ErrInvalid},
	} {
		if _, err := s.Ensure(t.Context(), c.spec); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
	onlyTemplates(t, p)
	if locks, err := os.ReadDir(filepath.Join(p.Root(), "locks")); err != nil || len(locks) != 0 {
		t.Errorf("refused specs left the lockfiles %v: %v", locks, err)
	}
}
