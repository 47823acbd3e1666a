// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package diskfs

import (
	"bytes"
	"errors"
	"maps"
	"math"
	"math/big"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/uuid"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
)

// watchdog ends the process if a fuzzed call does not return. The fuzzer itself would wait for ever
// and report nothing.
func watchdog(what string) (done func() bool) {
	return time.AfterFunc(30*time.Second, func() { panic(what + " does not return") }).Stop
}

// parts matches a quantity: sign, integer, fraction, suffix and exponent.
var parts = regexp.MustCompile(`^([+-]?)([0-9]*)(?:\.([0-9]*))?([a-zA-Z]*)([+-]?[0-9]*)$`)

// valueOf returns the exact value of an accepted quantity, by the definition of the suffixes in
// resource.Quantity.
func valueOf(t *testing.T, s string) *big.Rat {
	t.Helper()
	m := parts.FindStringSubmatch(s)
	if m == nil {
		t.Fatalf("%q was accepted and is no number", s)
	}
	v, ok := new(big.Rat).SetString(m[1] + "0" + m[2] + "." + m[3] + "0")
	if !ok {
		t.Fatalf("%q was accepted and is no number", s)
	}
	suffix, exponent := m[4], m[5]
	if exponent != "" { // or "E" alone, which is exa
		power, ok := new(big.Rat).SetString("1e" + exponent)
		if !ok || suffix != "e" && suffix != "E" {
			t.Fatalf("%q was accepted and is no number", s)
		}
		return v.Mul(v, power)
	}
	base, letter := int64(1000), suffix
	if strings.HasSuffix(suffix, "i") {
		base, letter = 1024, strings.ToLower(strings.TrimSuffix(suffix, "i"))
	}
	steps := slices.Index([]string{"n", "u", "m", "", "k", "M", "G", "T", "P", "E"}, letter)
	if base == 1024 {
		steps = 3 + slices.Index([]string{"", "k", "m", "g", "t", "p", "e"}, letter)
	}
	if steps < 0 {
		t.Fatalf("%q was accepted and has an unknown suffix", s)
	}
	for ; steps > 3; steps-- {
		v.Mul(v, big.NewRat(base, 1))
	}
	for ; steps < 3; steps++ {
		v.Mul(v, big.NewRat(1, base))
	}
	return v
}

// roundedUp returns v rounded up to whole units, and at most the largest int64.
func roundedUp(v *big.Rat, unit int64) int64 {
	v = new(big.Rat).Quo(v, big.NewRat(unit, 1))
	n := new(big.Int).Add(v.Num(), new(big.Int).Sub(v.Denom(), big.NewInt(1)))
	n.Div(n, v.Denom()).Mul(n, big.NewInt(unit))
	if !n.IsInt64() {
		return math.MaxInt64
	}
	return n.Int64()
}

// FuzzParseSize compares parsed sizes with an exact computation.
func FuzzParseSize(f *testing.F) {
	for _, s := range []string{
		"1Gi", "1e30", "-5", "1.5Mi", "1e999999999", "0.0000000001", "9223372036854775807", "8Ei", "1E", "1E3", ".5Gi", "5.", "9437185",
		"4503599626321920.5", "1n", "1e-99", strings.Repeat("9", 512), strings.Repeat("\U000e0001", 200), "\xff\xff",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		defer watchdog("ParseSize")()
		bytes, err := size.Parse(s)
		if err != nil {
			if !errors.Is(err, size.ErrInvalid) || !utf8.ValidString(err.Error()) || len(err.Error()) > 1024 {
				t.Errorf("%q: %v", s, err)
			}
			return
		}
		exact := valueOf(t, s)
		if exact.Sign() > 0 && bytes != roundedUp(exact, 1) || exact.Sign() <= 0 && bytes > 0 {
			t.Errorf("%q is read as %d bytes, want %s", s, bytes, exact.FloatString(3))
		}
		for _, fs := range table {
			rounded, err := fs.ParseSize(s)
			if err != nil {
				if !errors.Is(err, ErrOutOfRange) || bytes >= fs.MinSize && bytes <= fs.MaxSize {
					t.Errorf("%s: %q: %v", fs.Name, s, err)
				}
				continue
			}
			if rounded < fs.MinSize || rounded > fs.MaxSize || rounded != roundedUp(exact, MiB) {
				t.Errorf("%s: %q is read as %d bytes", fs.Name, s, rounded)
			}
		}
	})
}

// FuzzParseSpec reads texts. An accepted one is a valid spec, which has one spelling at least.
func FuzzParseSpec(f *testing.F) {
	for _, s := range []string{
		"xfs:10Gi", "ext4:1Gi:inode-size=512:label=data", "btrfs:1e9:nodesize=4096", "raw:1Gi", "ext4:1e999999999", ":::",
		"xfs:1Gi:label=", "xfs:1Gi:content=c", "raw:content=c", "\xff",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		defer watchdog("ParseSpec")()
		spec, err := ParseSpec(text)
		if err != nil {
			readable(t, err)
			return
		}
		valid := spec
		if spec.IsDisk() && spec.Content != "" {
			valid.Filesystem, valid.Size = "ext4", 1<<30 // the content decides its size
		}
		if err := valid.Validate(); err != nil || !lookup(t, valid.Filesystem).Formatted() {
			t.Errorf("%q is read as %s: %v", text, spec, err)
		}
		spelled := strings.ReplaceAll(spec.String(), " ", ":")
		if again, err := ParseSpec(spelled); err != nil || !again.Equal(spec) {
			t.Errorf("%q is read as %s, and %q as %s: %v", text, spec, spelled, again, err)
		}
	})
}

// change encodes a change for sample.image.
func change(place byte, at int, value ...byte) []byte {
	return append([]byte{place, byte(at), byte(at >> 8), byte(len(value) - 1)}, value...)
}

// logOverSuper moves the log of an xfs over its second superblock, and writes an unmount record into
// the rest of that block.
func logOverSuper(s sample) []byte {
	second := slices.Index(slices.Sorted(maps.Keys(s.blocks)), s.supers[1]) + 1
	super := s.blocks[s.supers[0]]
	start := be.AppendUint64(nil, 1<<super[xfsAGBlkLog])
	out := slices.Concat(change(0, xfsLogStart, start...), change(0, xfsLogBlocks, 0, 0, 0, 2))
	header := func(at int, value ...byte) { out = append(out, change(byte(second), xlogBlock+at, value...)...) }
	header(xlogMagic, be.AppendUint32(nil, xlogMagicValue)...)
	header(xlogCycle, 0, 0, 0, 1)
	header(xlogVersion, 0, 0, 0, 2)
	header(xlogLen, 0, 0, 2, 0)
	header(xlogNumOps, 0, 0, 0, 1)
	header(xlogUUID, super[xfsUUID:xfsUUID+8]...)
	header(xlogUUID+8, super[xfsUUID+8:xfsUUID+16]...)
	header(xlogBlock, 0, 0, 0, 1) // the operation's cycle
	header(xlogBlock+xlogOpFlags, xlogUnmountTrans)
	return out
}

// FuzzImage changes images that mkfs made. The result must be refused, or be usable as a source of
// clones. There must be no read or write outside the image, and not many more of them than it has
// superblocks. A new identity must change nothing else of an image that Verify accepts.
func FuzzImage(f *testing.F) {
	var samples []sample
	for i, name := range Names() {
		s := readSample(f, lookup(f, name))
		samples = append(samples, s)
		if _, err := s.fs.Verify(s.image(f, sampleSize, nil, false), sampleSize, sampleLabel); err != nil {
			f.Fatalf("the sample: %v", err)
		}
		for _, sealed := range []bool{false, true} {
			f.Add(uint8(i), int64(0), []byte(nil), sealed, false)
			f.Add(uint8(i), int64(gibibyte), []byte(nil), sealed, true)
			f.Add(uint8(i), int64(0), bytes.Repeat([]byte{0xff}, 64), sealed, true)
		}
		for place := range byte(len(s.blocks) + 1) {
			f.Add(uint8(i), int64(0), change(place, 0x40, 0xff, 0xff), true, true)
		}
	}
	for i, at := range map[uint8][]int{
		0: {btrfsFlags, btrfsLogRoot, btrfsTotalBytes, btrfsNumDevices, btrfsIncompat, btrfsDevSize, btrfsDevFSID, btrfsLabel},
		1: {ext4BlocksLo, ext4BlocksPerGroup, ext4InodesPerGroup, ext4State, ext4InodeSize, ext4GroupNumber, ext4Compat, ext4Incompat,
			ext4ROCompat, ext4ReservedGDT, ext4LastOrphan, ext4DescSize, ext4BlocksHi, ext4LogBlockSize},
		2: {xfsDBlocks, xfsLogStart, xfsAGBlocks, xfsAGCount, xfsLogBlocks, xfsAGBlkLog, xfsInProgress, xfsIncompat, xfsMetaUUID},
	} {
		for _, at := range at {
			f.Add(i, int64(0), change(0, at, 0, 0, 0, 0), true, false)
			f.Add(i, int64(0), change(0, at, 0xff, 0xff, 0xff, 0xff), true, true)
		}
	}
	f.Add(uint8(2), int64(0), logOverSuper(samples[2]), true, false)
	f.Fuzz(func(t *testing.T, which uint8, size int64, changes []byte, sealed, echo bool) {
		s := samples[int(which)%len(samples)]
		if size = RoundUp(size % gibibyte); size <= 0 {
			size = sampleSize
		}
		m := s.image(t, size, changes, sealed)
		if echo { // every hole reads as a copy of the superblock
			first := s.supers[0]
			m.hole = append(bytes.Clone(m.blocks[first][s.inBlock(first):]), make([]byte, s.inBlock(first))...)
		}
		sb, unknown := m.identify(s.fs)
		was, refused := m.verify(s.fs, sb.Label)
		if refused == nil {
			if unknown != nil || was != sb || was.Size <= 0 || was.Size > size || was.Short(size) || was.BlockSize != blockSize {
				t.Errorf("Verify accepted %+v, Identify returned %+v: %v", was, sb, unknown)
			}
			if _, err := m.verify(s.fs, sb.Label+"x"); err == nil {
				t.Error("Verify accepted the image with another label")
			}
		}
		copied := m.clone()
		id := uuid.UUID{1}
		if err := m.rename(s.fs, copied, id); err != nil {
			if refused == nil {
				t.Errorf("Verify accepted the image, NewIdentity did not: %v", err)
			}
			return
		}
		if got, err := copied.identify(s.fs); err != nil || got.UUID != id {
			t.Errorf("the clone has the identity %+v: %v", got, err)
		}
		for range 2 {
			want := was
			want.UUID = id
			if got, err := copied.verify(s.fs, sb.Label); refused == nil && (err != nil || got != want) {
				t.Fatalf("with a new identity the clone is %+v, want %+v: %v", got, want, err)
			}
			id = uuid.UUID{2}
			if err := copied.rename(s.fs, copied, id); err != nil {
				t.Fatalf("a second identity: %v", err)
			}
		}
	})
}

const gibibyte = 1 << 30
