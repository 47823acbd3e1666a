// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package diskfs

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/google/uuid"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
)

func lookup(t testing.TB, name string) *Filesystem {
	t.Helper()
	fs, err := Lookup(name)
	if err != nil {
		t.Fatal(err)
	}
	return fs
}

func TestTable(t *testing.T) {
	if got, want := Names(), []string{"btrfs", "ext4", "xfs"}; !slices.Equal(got, want) {
		t.Errorf("Names() = %q, want %q", got, want)
	}
	_, err := Lookup("zfs")
	if !errors.Is(err, ErrUnknown) {
		t.Fatalf("Lookup(zfs) = %v, want ErrUnknown", err)
	}
	for _, fs := range table {
		if !strings.Contains(err.Error(), fs.Name) {
			t.Errorf("%q does not offer %s", err, fs.Name)
		}
		if fs.MinSize < MiB || fs.MinSize%MiB != 0 {
			t.Errorf("%s: MinSize %d is not a whole number of MiB", fs.Name, fs.MinSize)
		}
		if err := fs.checkSize(fs.DefaultSize()); err != nil {
			t.Errorf("%s: the default size is refused: %v", fs.Name, err)
		}
		for _, o := range fs.options {
			if o.ok("") || o.ok("x") {
				t.Errorf("%s: option %s allows %q or %q", fs.Name, o.key, "", "x")
			}
		}
	}
}

func TestRaw(t *testing.T) {
	fs := lookup(t, "raw")
	if fs.Formatted() || fs.MkfsArgs("d", "", nil) != nil || fs.CheckArgs("d") != nil {
		t.Error("raw has programs")
	}
	_, verify := fs.Verify(zeroes, MiB, "")
	_, identify := fs.Identify(zeroes)
	for _, err := range []error{verify, identify, fs.NewIdentity(zeroes, nil, uuid.New())} {
		if !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("%v, want ErrUnsupported", err)
		}
	}
}

func TestRoundUp(t *testing.T) {
	for size, want := range map[int64]int64{
		0: 0, 1: MiB, 1024: MiB, MiB - 1: MiB, MiB: MiB, MiB + 1: 2 * MiB, MaxSize: MaxSize,
		MaxSize + 1: MaxSize + 1, math.MaxInt64: math.MaxInt64,
	} {
		if got := RoundUp(size); got != want {
			t.Errorf("RoundUp(%d) = %d, want %d", size, got, want)
		}
	}
}

func TestCheckSize(t *testing.T) {
	for _, fs := range table {
		for _, bytes := range []int64{fs.MinSize, fs.MinSize + 1, fs.MaxSize} {
			if err := fs.checkSize(bytes); err != nil {
				t.Errorf("%s: %v", fs.Name, err)
			}
		}
		for _, bytes := range []int64{math.MinInt64, -1, 0, fs.MinSize - MiB, fs.MinSize - 1, fs.MaxSize + 1, MaxSize + 1, math.MaxInt64} {
			err := fs.checkSize(bytes)
			if !errors.Is(err, ErrOutOfRange) {
				t.Fatalf("%s: checkSize(%d) = %v, want ErrOutOfRange", fs.Name, bytes, err)
			}
			for _, want := range []string{size.Format(bytes), size.Format(fs.MinSize), size.Format(fs.MaxSize)} {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%q does not say %q", err, want)
				}
			}
		}
	}
}

func TestCheckLabel(t *testing.T) {
	for _, c := range []struct {
		fs, label string
		ok        bool
	}{
		{"ext4", "", true},
		{"ext4", "Data_1.x-y", true},
		{"ext4", strings.Repeat("a", 16), true},
		{"ext4", strings.Repeat("a", 17), false},
		{"xfs", strings.Repeat("a", 12), true},
		{"xfs", strings.Repeat("a", 13), false},
		{"btrfs", strings.Repeat("a", 255), true},
		{"btrfs", strings.Repeat("a", 256), false},
		{"raw", "", true},
		{"raw", "a", false},
		{"ext4", "-L", false},
		{"ext4", "a b", false},
		{"ext4", "a/b", false},
		{"ext4", "a\x00b", false},
		{"ext4", "a\nb", false},
		{"ext4", "é", false},
		{"ext4", "\xff", false},
	} {
		err := lookup(t, c.fs).CheckLabel(c.label)
		if (err == nil) != c.ok || (err != nil && !errors.Is(err, ErrInvalid)) {
			t.Errorf("%s: CheckLabel(%q) = %v, want ok %v", c.fs, c.label, err, c.ok)
		}
	}
}

func TestCheckOptions(t *testing.T) {
	type opts = map[string]string
	for _, c := range []struct {
		fs   string
		opts opts
		err  string // the message contains it; empty if the options are allowed
	}{
		{"ext4", nil, ""},
		{"ext4", opts{"inode-size": "256", "bytes-per-inode": "67108864", "reserved-percent": "50", "journal": "off"}, ""},
		{"ext4", opts{"bytes-per-inode": "1024"}, ""},
		{"ext4", opts{"inode-size": "512", "bytes-per-inode": "1024"}, ""},
		{"ext4", opts{"inode-size": "1024", "bytes-per-inode": "1024"}, "more than inode-size"},
		{"ext4", opts{"inode-size": "128"}, "256, 512, 1024"},
		{"ext4", opts{"bytes-per-inode": "1000"}, "power of two"},
		{"ext4", opts{"bytes-per-inode": "512"}, "1024 to 67108864"},
		{"ext4", opts{"bytes-per-inode": "134217728"}, "1024 to 67108864"},
		{"ext4", opts{"reserved-percent": "51"}, "0 to 50"},
		{"ext4", opts{"reserved-percent": "-1"}, "0 to 50"},
		{"ext4", opts{"reserved-percent": "05"}, "0 to 50"},
		{"ext4", opts{"reserved-percent": "5%"}, "0 to 50"},
		{"ext4", opts{"journal": "maybe"}, "on, off"},
		{"ext4", opts{"-O": "encrypt"}, "only inode-size, bytes-per-inode"},
		{"xfs", opts{"inode-size": "2048", "rmapbt": "1", "bigtime": "0"}, ""},
		{"xfs", opts{"inode-size": "256"}, "512, 1024, 2048"},
		{"xfs", opts{"rmapbt": "yes"}, "0, 1"},
		{"xfs", opts{"journal": "off"}, "only inode-size, rmapbt, bigtime"},
		{"btrfs", opts{"nodesize": "65536", "metadata-profile": "dup"}, ""},
		{"btrfs", opts{"nodesize": "5000"}, "4096, 16384"},
		{"btrfs", opts{"metadata-profile": "raid1"}, "single, dup"},
		{"raw", nil, ""},
		{"raw", opts{"a": "b"}, "no format options"},
	} {
		err := lookup(t, c.fs).CheckOptions(c.opts)
		if c.err == "" && err != nil {
			t.Errorf("%s %v: %v", c.fs, c.opts, err)
		}
		if c.err != "" && (!errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), c.err)) {
			t.Errorf("%s %v: %v, want ErrInvalid that says %q", c.fs, c.opts, err, c.err)
		}
	}
}

func TestMkfsArgs(t *testing.T) {
	type opts = map[string]string
	for _, c := range []struct {
		fs, label string
		opts      opts
		want      string
	}{
		{"ext4", "", nil,
			"-F -q -b 4096 -m 0 -O metadata_csum,metadata_csum_seed -E assume_storage_prezeroed=1,nodiscard,packed_meta_blocks=1 DEV"},
		{"ext4", "l", opts{"journal": "off", "inode-size": "512", "bytes-per-inode": "8192", "reserved-percent": "5"},
			"-F -q -b 4096 -m 5 -O metadata_csum,metadata_csum_seed,^has_journal -E assume_storage_prezeroed=1,nodiscard,packed_meta_blocks=1 -I 512 -i 8192 -L l DEV"},
		{"xfs", "", nil, "-f -K -b size=4096 -s size=4096 DEV"},
		{"xfs", "l", opts{"rmapbt": "1", "bigtime": "0", "inode-size": "1024"},
			"-f -K -b size=4096 -s size=4096 -i size=1024 -m rmapbt=1 -m bigtime=0 -L l DEV"},
		{"btrfs", "", nil, "-f -K -s 4096 -m single DEV"},
		{"btrfs", "l", opts{"nodesize": "32768", "metadata-profile": "dup"}, "-f -K -s 4096 -m dup -n 32768 -L l DEV"},
	} {
		if got := strings.Join(lookup(t, c.fs).MkfsArgs("DEV", c.label, c.opts), " "); got != c.want {
			t.Errorf("%s %v:\n got %s\nwant %s", c.fs, c.opts, got, c.want)
		}
	}
}

func TestCheckArgs(t *testing.T) {
	for name, want := range map[string]string{"ext4": "-fn DEV", "xfs": "-n DEV", "btrfs": "check --readonly DEV"} {
		fs := lookup(t, name)
		fs.CheckArgs("other") // its slice must not be shared
		if got := strings.Join(fs.CheckArgs("DEV"), " "); got != want {
			t.Errorf("%s: %s, want %s", name, got, want)
		}
	}
}

// Byte orders, for building superblocks.
var (
	le = binary.LittleEndian
	be = binary.BigEndian
)

// zeroes is an endless image of zeroes.
var zeroes = readerAt(func(b []byte, _ int64) (int, error) { clear(b); return len(b), nil })

type readerAt func(b []byte, off int64) (int, error)

func (f readerAt) ReadAt(b []byte, off int64) (int, error) { return f(b, off) }

func TestVerifyRefusesWhatIsNoFilesystem(t *testing.T) {
	random := make([]byte, 2*MiB)
	for i := range random {
		random[i] = byte(rand.Uint32())
	}
	for what, r := range map[string]io.ReaderAt{
		"zeroes": zeroes, "garbage": bytes.NewReader(random), "empty": bytes.NewReader(nil), "short": bytes.NewReader(random[:100]),
	} {
		for _, name := range Names() {
			fs := lookup(t, name)
			_, verify := fs.Verify(r, 300*MiB, "")
			_, identify := fs.Identify(r)
			for _, err := range []error{verify, identify, fs.NewIdentity(r, nil, uuid.New())} {
				if !errors.Is(err, ErrCorrupt) {
					t.Errorf("%s: %s: %v, want ErrCorrupt", name, what, err)
				}
			}
		}
	}
}

// TestReadFailureIsNotCorruption checks that a failing disk does not make a template corrupt.
func TestReadFailureIsNotCorruption(t *testing.T) {
	broken := errors.New("input/output error")
	r := readerAt(func([]byte, int64) (int, error) { return 0, broken })
	for _, name := range Names() {
		if _, err := lookup(t, name).Verify(r, 300*MiB, ""); !errors.Is(err, broken) || errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: %v, want the reader's error and not ErrCorrupt", name, err)
		}
	}
}

func TestExt4BackupGroups(t *testing.T) {
	for groups, want := range map[int64][]int64{
		1: nil, 2: {1}, 4: {1, 3},
		800: {1, 3, 5, 7, 9, 25, 27, 49, 81, 125, 243, 343, 625, 729},
	} {
		s := ext4Super{groups: groups}
		if got := s.backupGroups(); !slices.Equal(got, want) {
			t.Errorf("%d groups: %v, want %v", groups, got, want)
		}
	}
}
