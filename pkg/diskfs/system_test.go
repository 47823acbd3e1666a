// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

// These tests need root, loop devices and the formatting tools. They fail, and do not skip, if one
// is missing.

package diskfs

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"log"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/uuid"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/reflink"
)

const gib = 1 << 30

// pool is the directory where images are made. It is an xfs, so that a clone of a mounted image shows
// it at one moment, as a crash does. A copy that reads block by block shows a state that never
// existed, and now and then cannot be recovered.
var pool string

func TestMain(m *testing.M) {
	os.Exit(func() int {
		dir, err := os.MkdirTemp("/var/tmp", "diskfs-")
		if err != nil {
			log.Fatal(err)
		}
		defer os.RemoveAll(dir)
		image := filepath.Join(dir, "image")
		pool = filepath.Join(dir, "pool")
		for _, argv := range [][]string{
			{"truncate", "-s", "64G", image},
			{"mkfs.xfs", "-q", "-s", "size=4096", image},
			{"mkdir", pool},
			{"mount", "-o", "loop", image, pool},
		} {
			if out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput(); err != nil {
				log.Printf("%s: %v\n%s", strings.Join(argv, " "), err, out)
				return 1
			}
		}
		defer func() {
			if out, err := exec.Command("umount", pool).CombinedOutput(); err != nil {
				log.Printf("umount %s: %v\n%s", pool, err, out)
			}
		}()
		return m.Run()
	}())
}

func workDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp(pool, "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func blank(t testing.TB, size int64) string {
	t.Helper()
	path := filepath.Join(workDir(t), "image")
	must(t, os.WriteFile(path, nil, 0o600))
	must(t, os.Truncate(path, size))
	return path
}

// format makes an image with the package's own arguments, and extra ones.
func format(t testing.TB, fs *Filesystem, size int64, label string, opts map[string]string, extra ...string) string {
	t.Helper()
	must(t, fs.checkSize(size))
	must(t, fs.CheckLabel(label))
	must(t, fs.CheckOptions(opts))
	path := blank(t, size)
	run(t, fs.Mkfs, append(extra, fs.MkfsArgs(path, label, opts)...)...)
	return path
}

func open(t testing.TB, path string, flags ...int) *os.File {
	t.Helper()
	mode := os.O_RDWR
	for _, f := range flags {
		mode |= f
	}
	f, err := os.OpenFile(path, mode, 0o600)
	must(t, err)
	t.Cleanup(func() { f.Close() })
	return f
}

// clone clones an image as it is at this moment, mounted or not.
func clone(t testing.TB, path string) string {
	t.Helper()
	dst := open(t, filepath.Join(workDir(t), "image"), os.O_CREATE)
	must(t, reflink.Clone(dst, open(t, path)))
	return dst.Name()
}

// mounted mounts an image and returns the directory and a function that unmounts it.
func mounted(t testing.TB, fs *Filesystem, path string, opts ...string) (string, func()) {
	t.Helper()
	dir := filepath.Join(workDir(t), "mnt")
	must(t, os.Mkdir(dir, 0o700))
	run(t, "mount", "-t", fs.Name, "-o", strings.Join(append([]string{"loop"}, opts...), ","), path, dir)
	done := false
	umount := func() {
		if !done {
			done = true
			testenv.Umount(t, dir)
		}
	}
	t.Cleanup(umount)
	return dir, umount
}

func put(t testing.TB, dir, name, content string) {
	t.Helper()
	f, err := os.Create(filepath.Join(dir, name))
	must(t, err)
	_, err = f.WriteString(content)
	must(t, err)
	must(t, f.Sync())
	must(t, f.Close())
}

func contains(t testing.TB, dir, name, content string) {
	t.Helper()
	if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(got) != content {
		t.Errorf("%s: %q, %v, want %q", name, got, err, content)
	}
}

// fsck runs the filesystem's own checker.
func fsck(t testing.TB, fs *Filesystem, path string) {
	t.Helper()
	args := fs.CheckArgs(path)
	if fs.Name == "xfs" {
		args = append([]string{"-f"}, args...) // a regular file
	}
	run(t, fs.Checker, args...)
}

// is checks with this package, blkid and the filesystem's checker that an image is good and has this
// UUID.
func is(t testing.TB, fs *Filesystem, path string, size int64, label string, id uuid.UUID) {
	t.Helper()
	f := open(t, path)
	sb, err := fs.Verify(f, size, label)
	must(t, err)
	primary, err := fs.Identify(f)
	must(t, err)
	if sb != primary || sb.UUID != id || sb.Label != label || sb.BlockSize != 4096 {
		t.Errorf("%+v, primary %+v, want UUID %s, label %q, blocks of 4096", sb, primary, id, label)
	}
	for tag, want := range map[string]string{"UUID": id.String(), "LABEL": label, "TYPE": fs.Name} {
		if want == "" {
			continue // blkid exits 2 for a tag that is not there
		}
		if got := run(t, "blkid", "-p", "-o", "value", "-s", tag, path); got != want {
			t.Errorf("blkid: %s=%s, want %s", tag, got, want)
		}
	}
	fsck(t, fs, path)
}

func identify(t testing.TB, fs *Filesystem, path string) uuid.UUID {
	t.Helper()
	sb, err := fs.Identify(open(t, path))
	must(t, err)
	return sb.UUID
}

// rename gives the image at path a new identity, built from the blocks of from.
func rename(t testing.TB, fs *Filesystem, from, path string) uuid.UUID {
	t.Helper()
	id := uuid.New()
	must(t, fs.NewIdentity(open(t, from), open(t, path), id))
	return id
}

// coexist mounts template and clones at once and writes to all.
func coexist(t testing.TB, fs *Filesystem, paths ...string) {
	t.Helper()
	var umounts []func()
	for i, path := range paths {
		dir, umount := mounted(t, fs, path) // without MountData: the UUID alone must do
		umounts = append(umounts, umount)
		put(t, dir, "file", fmt.Sprint(i))
	}
	for _, umount := range umounts {
		umount()
	}
	for i, path := range paths {
		dir, umount := mounted(t, fs, path, append(fs.MountData, append(fs.ROMountData, "ro")...)...)
		contains(t, dir, "file", fmt.Sprint(i))
		umount()
		fsck(t, fs, path)
	}
}

func lifeOf(t *testing.T, fs *Filesystem, size int64, label string, opts map[string]string) {
	template := format(t, fs, size, label, opts)
	t.Logf("%s, %s", run(t, "filefrag", template), run(t, "du", "-k", template))
	first := identify(t, fs, template)
	is(t, fs, template, size, label, first)

	if _, err := fs.Verify(open(t, template), size, label+"x"); !errors.Is(err, ErrCorrupt) {
		t.Errorf("wrong label: %v, want ErrCorrupt", err)
	}
	if _, err := fs.Verify(open(t, template), size+128*MiB, label); !errors.Is(err, ErrCorrupt) {
		t.Errorf("larger image: %v, want ErrCorrupt", err)
	}
	if _, err := fs.Verify(open(t, template), size-MiB, label); !errors.Is(err, ErrCorrupt) {
		t.Errorf("smaller image: %v, want ErrCorrupt", err)
	}

	one, two := clone(t, template), clone(t, template)
	is(t, fs, one, size, label, rename(t, fs, template, one))
	rename(t, fs, template, two)
	is(t, fs, two, size, label, rename(t, fs, two, two)) // twice, and onto itself
	is(t, fs, template, size, label, first)
	coexist(t, fs, template, one, two)

	// A source that was used and unmounted, as a template with content is.
	is(t, fs, two, size, label, identify(t, fs, two))
	three := clone(t, two)
	is(t, fs, three, size, label, rename(t, fs, two, three))
	coexist(t, fs, two, three)
}

func TestLife(t *testing.T) {
	for _, name := range Names() {
		fs := lookup(t, name)
		for _, size := range slices.Compact([]int64{fs.MinSize, 300 * MiB, 301 * MiB, gib, 100 * gib}) {
			t.Run(fmt.Sprintf("%s-%dMiB", name, size/MiB), func(t *testing.T) { lifeOf(t, fs, size, "data_1", nil) })
		}
	}
	t.Run("btrfs-mirror-at-256GiB", func(t *testing.T) { lifeOf(t, &btrfs, 257*gib, "", nil) })
}

func TestLifeWithOptions(t *testing.T) {
	type opts = map[string]string
	for name, sets := range map[string][]opts{
		"ext4": {{"inode-size": "1024", "bytes-per-inode": "2048"}, {"inode-size": "512", "bytes-per-inode": "1024"},
			{"journal": "off", "reserved-percent": "50"}, {"bytes-per-inode": "67108864"}, {"journal": "on", "reserved-percent": "0"}},
		"xfs":   {{"inode-size": "2048", "rmapbt": "1", "bigtime": "0"}, {"inode-size": "1024", "rmapbt": "0", "bigtime": "1"}},
		"btrfs": {{"nodesize": "65536", "metadata-profile": "dup"}, {"nodesize": "4096"}, {"nodesize": "32768"}},
	} {
		fs := lookup(t, name)
		for _, o := range sets {
			for _, size := range []int64{fs.MinSize, 5 * gib} {
				t.Run(fmt.Sprintf("%s-%v-%dMiB", name, o, size/MiB), func(t *testing.T) { lifeOf(t, fs, size, "", o) })
			}
		}
	}
}

// TestVerifyOddSizes checks that Verify accepts images of every size. mkfs.ext4 drops a short last
// group.
func TestVerifyOddSizes(t *testing.T) {
	for _, name := range Names() {
		fs := lookup(t, name)
		for extra := int64(1); extra < 140; extra += 6 {
			size := max(fs.MinSize, 256*MiB) + extra*MiB
			for _, o := range []map[string]string{nil, {"bytes-per-inode": "2048"}} {
				if fs.CheckOptions(o) != nil {
					continue
				}
				if _, err := fs.Verify(open(t, format(t, fs, size, "", o)), size, ""); err != nil {
					t.Errorf("%v", err)
				}
			}
		}
	}
}

// TestMinSize checks that some allowed format fails one MiB below MinSize.
func TestMinSize(t *testing.T) {
	hardest := map[string]map[string]string{
		"ext4": {"inode-size": "1024", "bytes-per-inode": "2048"}, "xfs": nil, "btrfs": {"metadata-profile": "dup"},
	}
	for _, name := range Names() {
		fs := lookup(t, name)
		if err := fs.checkSize(fs.MinSize - MiB); !errors.Is(err, ErrOutOfRange) {
			t.Errorf("%s: %v, want ErrOutOfRange", name, err)
		}
		path := blank(t, fs.MinSize-MiB)
		if out, err := exec.Command(fs.Mkfs, fs.MkfsArgs(path, "", hardest[name])...).CombinedOutput(); err == nil {
			t.Errorf("%s: mkfs takes less than MinSize: lower it\n%s", name, out)
		}
	}
}

// places returns the positions of an image's superblocks, the primary's first.
func places(t testing.TB, fs *Filesystem, path string) []int64 {
	t.Helper()
	f := open(t, path)
	var at []int64
	switch fs.Name {
	case "ext4":
		s, err := readExt4(f)
		must(t, err)
		at = append(at, ext4SuperAt)
		for _, g := range s.backupGroups() {
			at = append(at, s.backupAt(g))
		}
	case "xfs":
		s, err := readXFS(f, 0)
		must(t, err)
		for g := range s.agCount {
			at = append(at, s.copyAt(g))
		}
	case "btrfs":
		s, err := readBtrfs(f, btrfsPrimary)
		must(t, err)
		at = append([]int64{btrfsPrimary}, s.mirrors()...)
	}
	return at
}

func TestDamage(t *testing.T) {
	const size = 1 * gib
	for _, name := range Names() {
		fs := lookup(t, name)
		path := format(t, fs, size, "l", nil)
		f := open(t, path)
		refused := func(what string) {
			t.Helper()
			if _, err := fs.Verify(f, size, "l"); !errors.Is(err, ErrCorrupt) {
				t.Errorf("%s: %s: %v, want ErrCorrupt", name, what, err)
			}
		}
		at := places(t, fs, path)
		if len(at) < 2 {
			t.Fatalf("%s: superblocks at %v, want copies", name, at)
		}
		for i, place := range at {
			length := int64(1024)
			good, err := read(f, place, int(length))
			must(t, err)
			for off := int64(0); off < length; off++ {
				bad := []byte{good[off] ^ 0x10}
				_, err := f.WriteAt(bad, place+off)
				must(t, err)
				refused(fmt.Sprintf("superblock %d, byte %#x flipped", i, off))
				if name == "btrfs" && off >= 4 && off < btrfsFSID {
					// The rest of csum: the kernel does not check it either.
				} else if _, err := fs.Identify(f); i == 0 && !errors.Is(err, ErrCorrupt) {
					t.Errorf("%s: Identify with byte %#x flipped: %v", name, off, err)
				}
				_, err = f.WriteAt(good[off:off+1], place+off)
				must(t, err)
			}
			_, err = f.WriteAt(make([]byte, length), place)
			must(t, err)
			refused(fmt.Sprintf("superblock %d zeroed", i))
			_, err = f.WriteAt(good, place)
			must(t, err)
		}
		is(t, fs, path, size, "l", identify(t, fs, path))
		must(t, f.Truncate(at[len(at)-1]))
		refused("truncated before the last superblock")
		must(t, f.Truncate(512))
		refused("truncated to 512 bytes")
	}
	f := open(t, format(t, &xfs, 300*MiB, "", nil))
	s, err := readXFS(f, 0)
	must(t, err)
	_, err = f.WriteAt(make([]byte, 64*1024), s.logAt)
	must(t, err)
	if _, err := xfs.Verify(f, 300*MiB, ""); !errors.Is(err, ErrCorrupt) {
		t.Errorf("xfs: zeroed log: %v, want ErrCorrupt", err)
	}
}

// TestMetaBG checks that an ext4 with meta_bg is recognised and can get a new identity. A kernel may
// turn to meta_bg when it grows a filesystem beyond the descriptors that mkfs has reserved.
func TestMetaBG(t *testing.T) {
	fs := lookup(t, "ext4")
	path := blank(t, 300*MiB)
	args := fs.MkfsArgs(path, "", nil)
	run(t, fs.Mkfs, append([]string{"-O", "meta_bg,^resize_inode"}, args...)...)
	f := open(t, path)
	sb, err := fs.Identify(f)
	if err != nil || sb.Short(300*MiB) {
		t.Errorf("%+v: %v", sb, err)
	}
	must(t, fs.NewIdentity(f, f, uuid.New()))
	run(t, "e2fsck", "-fn", path)
}

func TestForeignFormatsAreRefused(t *testing.T) {
	for what, args := range map[string][]string{
		"ext4 without a seed":  {"mkfs.ext4", "-F", "-q", "-b", "4096", "-O", "metadata_csum,^metadata_csum_seed"},
		"ext4 with 1 KiB":      {"mkfs.ext4", "-F", "-q", "-b", "1024"},
		"ext4 sparse_super2":   {"mkfs.ext4", "-F", "-q", "-b", "4096", "-O", "metadata_csum,metadata_csum_seed,sparse_super2"},
		"xfs with sectors":     {"mkfs.xfs", "-f", "-s", "size=512"},
		"xfs without checksum": {"mkfs.xfs", "-f", "-m", "crc=0", "-s", "size=4096"},
		"btrfs with xxhash":    {"mkfs.btrfs", "-f", "--csum", "xxhash"},
	} {
		fs := lookup(t, strings.Fields(what)[0])
		path := blank(t, 300*MiB)
		run(t, args[0], append(args[1:], path)...)
		_, err := fs.Verify(open(t, path), 300*MiB, "")
		if !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: %v, want ErrCorrupt", what, err)
		}
		if err := fs.NewIdentity(open(t, path), open(t, path), uuid.New()); err == nil {
			t.Errorf("%s: NewIdentity accepted it", what)
		} else {
			t.Log(err)
		}
	}
}

var writeSamples = flag.Bool("samples", false, "write the samples of FuzzImage anew")

// TestSamples checks that the samples of FuzzImage are like the images that mkfs makes.
func TestSamples(t *testing.T) {
	for _, name := range Names() {
		fs := lookup(t, name)
		f := open(t, format(t, fs, sampleSize, sampleLabel, nil))
		if *writeSamples {
			must(t, os.WriteFile(samplePath(fs), pack(t, fs, f), 0o644))
		}
		want, err := fs.Verify(f, sampleSize, sampleLabel)
		must(t, err)
		got, err := fs.Verify(readSample(t, fs).image(t, sampleSize, nil, false), sampleSize, sampleLabel)
		must(t, err)
		if got.Size != want.Size || got.Label != want.Label || got.BlockSize != want.BlockSize {
			t.Errorf("%s: the sample is %+v, mkfs makes %+v: run this with -samples", name, got, want)
		}
	}
}

// pack returns the file that readSample reads: the blocks of an image that Verify reads.
func pack(t *testing.T, fs *Filesystem, image *os.File) []byte {
	t.Helper()
	blocks := map[int64][]byte{}
	_, err := fs.Verify(readerAt(func(b []byte, off int64) (int, error) {
		at := off - off%blockSize
		block, err := read(image, at, blockSize)
		must(t, err)
		if !bytes.Equal(block, zeroBlock) {
			blocks[at] = block
		}
		return image.ReadAt(b, off)
	}), sampleSize, sampleLabel)
	must(t, err)
	var packed bytes.Buffer
	w, err := gzip.NewWriterLevel(&packed, gzip.BestCompression)
	must(t, err)
	for _, off := range slices.Sorted(maps.Keys(blocks)) {
		must(t, binary.Write(w, be, off))
		_, err := w.Write(blocks[off])
		must(t, err)
	}
	must(t, w.Close())
	return packed.Bytes()
}

// BenchmarkHundredGiB measures the calls that every use of a template pays for. Most of the time goes
// into system calls.
func BenchmarkHundredGiB(b *testing.B) {
	for _, name := range Names() {
		fs := lookup(b, name)
		path := format(b, fs, 100*gib, "", nil)
		src, dst := open(b, path), open(b, clone(b, path))
		id := uuid.New()
		b.Run(name+"/Identify", func(b *testing.B) {
			for b.Loop() {
				_, err := fs.Identify(src)
				must(b, err)
			}
		})
		b.Run(name+"/Verify", func(b *testing.B) {
			for b.Loop() {
				_, err := fs.Verify(src, 100*gib, "")
				must(b, err)
			}
		})
		b.Run(name+"/NewIdentity", func(b *testing.B) {
			for b.Loop() {
				must(b, fs.NewIdentity(src, dst, id))
			}
		})
	}
}
