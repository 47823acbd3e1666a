// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package vmformat

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/tmpfile"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/vmformat/guest"
)

// filling builds a Fill layer by layer. Its file has no name.
type filling struct {
	t testing.TB
	*Fill
	w    *tar.Writer
	from int64
}

func newFilling(t testing.TB) *filling {
	t.Helper()
	f, err := tmpfile.Create(testenv.Dir(t), 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return &filling{t: t, Fill: &Fill{Archive: f, Content: guest.Content{Digest: "sha256:test"}}, w: tar.NewWriter(f)}
}

// add adds an entry.
func (f *filling) add(h tar.Header, content string) {
	f.t.Helper()
	h.Size, h.Format = int64(len(content)), tar.FormatPAX
	err := f.w.WriteHeader(&h)
	if err == nil {
		_, err = io.WriteString(f.w, content)
	}
	if err != nil {
		f.t.Fatal(err)
	}
	f.Entries++
	f.Bytes += h.Size
}

// layer ends a layer.
func (f *filling) layer() {
	f.t.Helper()
	err := f.w.Close()
	end, seekErr := f.Archive.Seek(0, io.SeekCurrent)
	if err := errors.Join(err, seekErr); err != nil {
		f.t.Fatal(err)
	}
	f.Layers = append(f.Layers, guest.Layer{Offset: f.from, Length: end - f.from})
	f.from, f.w = end, tar.NewWriter(f.Archive)
}

// look mounts an image read-only, and returns the mount point.
func look(t *testing.T, fs string, image *os.File) string {
	t.Helper()
	at := filepath.Join(testenv.Dir(t), "fs")
	if err := os.Mkdir(at, 0o700); err != nil {
		t.Fatal(err)
	}
	testenv.Run(t, "mount", "-t", fs, "-o", "loop,ro,nosuid,nodev", image.Name(), at)
	t.Cleanup(func() { testenv.Unmount(t, at) })
	return at
}

// kept are extended attributes of a file, as the kernel stores them: capability.h and
// posix_acl_xattr.h of linux/. The ACL lets user 1000 read.
var kept = map[string]string{
	"user.a":              "b\x00c",
	"trusted.a":           "d",
	"security.capability": "\x01\x00\x00\x02\x00\x20\x00\x00" + strings.Repeat("\x00", 12), // cap_net_raw=ep
	"system.posix_acl_access": "\x02\x00\x00\x00\x01\x00\x06\x00\xff\xff\xff\xff\x02\x00\x04\x00\xe8\x03\x00\x00" +
		"\x04\x00\x04\x00\xff\xff\xff\xff\x10\x00\x06\x00\xff\xff\xff\xff\x20\x00\x00\x00\xff\xff\xff\xff",
}

// longName is a path with the longest component that there can be.
var longName = "etc/" + strings.Repeat("l", 255)

// TestFill fills each filesystem with two layers, and looks at the result with this machine's
// kernel and checker.
func TestFill(t *testing.T) {
	testenv.Root(t)
	owner, group := 1000, int64(2000)
	large := strings.Repeat("0123456789abcdef", 5<<20/16)
	fill := newFilling(t)
	fill.UID, fill.FSGroup = &owner, &group
	fill.add(tar.Header{Name: "etc/", Typeflag: tar.TypeDir, Mode: 0o700, ModTime: time.Unix(1e9, 0)}, "")
	fill.add(tar.Header{Name: "etc/large", Mode: 0o4755, Uid: 7, ModTime: time.Unix(1e9, 5)}, large)
	attrs := map[string]string{}
	for name, value := range kept {
		attrs["SCHILY.xattr."+name] = value
	}
	fill.add(tar.Header{Name: longName, Mode: 0o660, PAXRecords: attrs}, "")
	fill.add(tar.Header{Name: "etc/sparse", Mode: 0o600}, string(make([]byte, 64<<20))+"x")
	fill.add(tar.Header{Name: "etc/again", Typeflag: tar.TypeLink, Linkname: "etc/large"}, "")
	fill.add(tar.Header{Name: "gone/file"}, "gone")
	for i := range 500 {
		fill.add(tar.Header{Name: fmt.Sprintf("many/%d/file", i), Mode: 0o644}, strings.Repeat("x", 10*i))
	}
	fill.layer()
	fill.add(tar.Header{Name: "link", Typeflag: tar.TypeSymlink, Linkname: "/etc/passwd"}, "")
	fill.add(tar.Header{Name: ".wh.gone"}, "")
	fill.layer()
	for _, fs := range diskfs.Names() {
		t.Run(fs, func(t *testing.T) {
			image := image(t, testenv.Dir(t))
			spec := diskfs.Spec{Filesystem: fs, Size: 512 << 20, Label: "full"}
			f := newFormatter(t, func(c *Config) { c.Save = true })
			before, err := f.Fingerprint(spec, &fill.Content)
			if err != nil {
				t.Fatal(err)
			}
			var stages []guest.Stage
			r, err := f.Format(t.Context(), image, spec, fill.Fill, func(p guest.Progress) { stages = append(stages, p.Stage) })
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("boot %s, mkfs %s, unpack %s, check %s, in all %s: %d entries, %s",
				r.Boot, r.Make, r.Unpack, r.Check, r.Elapsed, r.Entries, size.Format(r.Bytes))
			if got := fmt.Sprint(slices.Compact(stages)); got != "[boot mkfs unpack check done]" {
				t.Errorf("the stages are %s", got)
			}
			unpacked := r.Entries == fill.Entries-1 && r.Bytes > int64(len(large)) && r.Bytes < 10<<20
			if r.Fingerprint != before || r.Restored || !unpacked {
				t.Errorf("the report is %+v; the fingerprint was %s", r, before)
			}
			testenv.Fsck(t, fs, image.Name())
			at := look(t, fs, image)
			isFilled(t, at, large)
		})
	}
}

// isFilled looks at what TestFill has unpacked.
func isFilled(t *testing.T, at, large string) {
	t.Helper()
	for name, want := range map[string]string{
		".": "40000 2775 1000:2000", "etc": "40000 2770 0:2000", "etc/large": "100000 4775 7:2000",
		"link": "120000 777 0:2000", "many/499/file": "100000 664 0:2000",
	} {
		var st syscall.Stat_t
		if err := syscall.Lstat(filepath.Join(at, name), &st); err != nil {
			t.Error(err)
		}
		if is := fmt.Sprintf("%o %o %d:%d", st.Mode&syscall.S_IFMT, st.Mode&0o7777, st.Uid, st.Gid); is != want {
			t.Errorf("%s is %s, want %s", name, is, want)
		}
	}
	var st, again syscall.Stat_t
	err := errors.Join(syscall.Lstat(filepath.Join(at, "etc/large"), &st), syscall.Lstat(filepath.Join(at, "etc/again"), &again))
	if err != nil || st.Ino != again.Ino {
		t.Errorf("the hard link is %d, its target %d: %v", again.Ino, st.Ino, err)
	}
	if st.Mtim != (syscall.Timespec{Sec: 1e9, Nsec: 5}) {
		t.Errorf("the time of the file is %+v", st.Mtim)
	}
	if err := syscall.Lstat(filepath.Join(at, "etc"), &st); err != nil || st.Mtim.Sec != 1e9 {
		t.Errorf("the time of its directory is %+v: %v", st.Mtim, err)
	}
	for name, want := range kept {
		value := make([]byte, 100)
		if n, err := syscall.Getxattr(filepath.Join(at, longName), name, value); err != nil || string(value[:n]) != want {
			t.Errorf("the attribute %s is %q, want %q: %v", name, value[:max(n, 0)], want, err)
		}
	}
	if b, err := os.ReadFile(filepath.Join(at, "etc/large")); err != nil || string(b) != large {
		t.Errorf("the large file has %d bytes: %v", len(b), err)
	}
	if err := syscall.Lstat(filepath.Join(at, "etc/sparse"), &st); err != nil || st.Size != 64<<20+1 || st.Blocks > 64 {
		t.Errorf("the sparse file has %d bytes and takes %d sectors: %v", st.Size, st.Blocks, err)
	}
	if _, err := os.Lstat(filepath.Join(at, "gone")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("what the second layer hides: %v", err)
	}
}

// TestFillFails has contents that cannot be unpacked, and a VM that is killed while it unpacks one.
// Each fails once, and for good.
func TestFillFails(t *testing.T) {
	testenv.Root(t)
	small := diskfs.Spec{Filesystem: "ext4", Size: 64 << 20}
	full := newFilling(t)
	full.add(tar.Header{Name: "small"}, "x")
	full.add(tar.Header{Name: "large"}, strings.Repeat("x", 90<<20))
	full.layer()
	cut := newFilling(t)
	cut.add(tar.Header{Name: "etc/passwd"}, strings.Repeat("x", 1<<20))
	cut.layer()
	cut.Layers[0].Length /= 2
	for name, c := range map[string]struct {
		fill  *Fill
		is    error
		words []string
	}{
		"too large": {full.Fill, ErrTooSmall, []string{"ext4 64Mi", "no space is left after 1 of 2 entries", "larger size"}},
		"cut":       {cut.Fill, ErrFormat, []string{"unpack failed", `entry "etc/passwd"`, "unexpected EOF"}},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := newFormatter(t, nil).Format(t.Context(), image(t, testenv.Dir(t)), small, c.fill, nil)
			if !errors.Is(err, ErrFormat) || !errors.Is(err, c.is) || errors.Is(err, ErrNoSpace) {
				t.Fatalf("%v, want %v", err, c.is)
			}
			t.Logf("the operator reads: %v", err)
			for _, w := range c.words {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("the message lacks %q", w)
				}
			}
		})
	}
	t.Run("full pool", func(t *testing.T) {
		dir := testenv.XFS.Mount(t, 300<<20)
		free := strings.TrimSpace(testenv.Run(t, "stat", "-f", "-c", "%f", dir)) // blocks of 4 KiB
		blocks, err := strconv.Atoi(free)
		if err != nil {
			t.Fatal(err)
		}
		testenv.Run(t, "fallocate", "--length", fmt.Sprint((blocks<<12)-(50<<20)), filepath.Join(dir, "ballast"))
		reached := guest.StageBoot
		_, err = newFormatter(t, nil).Format(t.Context(), image(t, dir), diskfs.Spec{Filesystem: "ext4", Size: 200 << 20}, full.Fill,
			func(p guest.Progress) { reached = p.Stage })
		if !errors.Is(err, ErrNoSpace) || errors.Is(err, ErrTooSmall) || reached != guest.StageUnpack {
			t.Errorf("%v, at stage %s", err, reached)
		}
	})
	t.Run("canceled", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		boots := 0
		_, err := newFormatter(t, nil).Format(ctx, image(t, testenv.Dir(t)), small, full.Fill, func(p guest.Progress) {
			switch p.Stage {
			case guest.StageBoot:
				boots++
			case guest.StageUnpack:
				cancel()
			}
		})
		if !errors.Is(err, context.Canceled) || boots != 1 {
			t.Errorf("%v, after %d boots", err, boots)
		}
	})
	t.Run("deadline", func(t *testing.T) {
		v, o := broken(t, nil, nil)
		o.fill, o.job.Content = full.Fill, &full.Content
		if err := v.give(full.Fill); err != nil {
			t.Fatal(err)
		}
		v.timeout = 8 * time.Second
		out := runOne(t.Context(), v, o, func(p guest.Progress) {
			if p.Stage == guest.StageUnpack {
				syscall.Kill(findProcess(v.nonce), syscall.SIGSTOP)
			}
		})
		if err := out.judge(); !errors.Is(err, ErrFormat) || !strings.Contains(err.Error(), "killed at its deadline of 8s") {
			t.Errorf("%v", err)
		}
	})
}

// TestFillStuck has no time for a boot, and much for what follows. The VM is tried twice, and its time is not
// waited for.
func TestFillStuck(t *testing.T) {
	testenv.Root(t)
	fill := newFilling(t)
	fill.add(tar.Header{Name: "file"}, "x")
	fill.layer()
	fill.Entries = 1_000_000
	f := newFormatter(t, func(c *Config) { c.Timeout = 300 * time.Millisecond })
	boots := 0
	began := time.Now()
	_, err := f.Format(t.Context(), image(t, testenv.Dir(t)), diskfs.Spec{Filesystem: "ext4", Size: 64 << 20}, fill.Fill, func(p guest.Progress) {
		if p.Stage == guest.StageBoot {
			boots++
		}
	})
	if !errors.Is(err, ErrFormat) || !strings.Contains(err.Error(), "killed at its deadline of 300ms") || boots != 2 || time.Since(began) > time.Minute {
		t.Errorf("after %d boots and %s: %v", boots, time.Since(began), err)
	}
}
