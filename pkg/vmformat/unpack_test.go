// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package vmformat

import (
	"bytes"
	"compress/gzip"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/u-root/u-root/pkg/boot/bzimage"
)

const tinyKernel = "\x7fELF and the kernel"

// xzKernel is tinyKernel, as scripts/xz_wrap.sh of the kernel compresses it for x86: with
// xz --check=crc32 --x86 --lzma2=dict=1MiB.
var xzKernel = func() string {
	b, err := base64.StdEncoding.DecodeString("/Td6WFoAAAFpIt42AgEEACEBEACLIW9JAQASf0VMRiBhbmQgdGhlIGtlcm5lbAAAMYnqaQABJxOQRv1+kEKZDQEAAAAAAVla")
	if err != nil {
		panic(err)
	}
	return string(b)
}()

// largeKernel takes two lz4 blocks, and does not compress to nothing.
var largeKernel = func() string {
	b := make([]byte, lz4Block+12345)
	r := rand.New(rand.NewPCG(1, 2))
	for i := range len(b) / 512 {
		b[512*i] = byte(r.Uint32())
	}
	return "\x7fELF" + string(b)
}()

// packed compresses a kernel by a writer.
func packed[W io.WriteCloser](t testing.TB, kernel string, open func(io.Writer) W) string {
	t.Helper()
	var b bytes.Buffer
	w := open(&b)
	if _, err := io.WriteString(w, kernel); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func zstdWriter(window int) func(io.Writer) *zstd.Encoder {
	return func(w io.Writer) *zstd.Encoder {
		z, err := zstd.NewWriter(w, zstd.WithWindowSize(window))
		if err != nil {
			panic(err)
		}
		return z
	}
}

func lz4Writer(w io.Writer) *lz4.Writer {
	z := lz4.NewWriter(w)
	if err := z.Apply(lz4.LegacyOption(true)); err != nil {
		panic(err)
	}
	return z
}

// sized appends the size of a kernel, as the kernel's build does to all formats but gzip.
func sized(packed, kernel string) string {
	return packed + string(binary.LittleEndian.AppendUint32(nil, uint32(len(kernel))))
}

// bzImageOf is a bzImage with the given payload, and something behind it.
func bzImageOf(t testing.TB, payload string) []byte {
	t.Helper()
	h := bzimage.LinuxHeader{
		SetupSects: 3, HeaderMagic: bzimage.HeaderMagic, Protocolversion: 0x20f, Bootsectormagic: 0xaa55,
		PayloadOffset: 100, PayloadSize: uint32(len(payload)),
	}
	var b bytes.Buffer
	if err := binary.Write(&b, binary.LittleEndian, h); err != nil {
		t.Fatal(err)
	}
	b.Write(make([]byte, 4*512+100-b.Len()))
	b.WriteString(payload)
	b.WriteString("code, and a signature")
	return b.Bytes()
}

// payloads has a kernel in the formats that are unpacked by blocks or by windows.
func payloads(t testing.TB, kernel string, window int) map[string]string {
	t.Helper()
	return map[string]string{
		"zstd": sized(packed(t, kernel, zstdWriter(window)), kernel),
		"lz4":  sized(packed(t, kernel, lz4Writer), kernel),
	}
}

// tinyPayloads has tinyKernel in each known format.
func tinyPayloads(t testing.TB) map[string]string {
	t.Helper()
	all := payloads(t, tinyKernel, 1<<20)
	all["gzip"] = packed(t, tinyKernel, gzip.NewWriter)
	all["xz"] = sized(xzKernel, tinyKernel)
	return all
}

func TestUnpackBzImage(t *testing.T) {
	for kernel, packed := range map[string]map[string]string{tinyKernel: tinyPayloads(t), largeKernel: payloads(t, largeKernel, maxWindow)} {
		for name, payload := range packed {
			image := bzImageOf(t, payload)
			for how, from := range map[string]io.Reader{"at once": bytes.NewReader(image), "in halves": iotest.HalfReader(bytes.NewReader(image))} {
				var got bytes.Buffer
				if err := unpackBzImage(&got, from); err != nil || got.String() != kernel {
					t.Errorf("%s, %s: %d bytes, want %d, or others: %v", name, how, got.Len(), len(kernel), err)
				}
			}
		}
	}
}

// TestUnpackDamaged has images that an interrupted or failing disk leaves behind.
func TestUnpackDamaged(t *testing.T) {
	for name, payload := range tinyPayloads(t) {
		whole := bzImageOf(t, payload)
		end := bytes.Index(whole, []byte("code, and"))
		for size := range end {
			if err := unpackBzImage(io.Discard, bytes.NewReader(whole[:size])); err == nil {
				t.Errorf("%s: %d of %d bytes are unpacked without an error", name, size, end)
			}
		}
	}
	old := bzImageOf(t, sized(xzKernel, tinyKernel))
	binary.LittleEndian.PutUint16(old[0x206:], 0x207)
	for name, c := range map[string]struct {
		image []byte
		says  string
	}{
		"no image":           {bytes.Repeat([]byte("text "), 1000), "no bzImage"},
		"before payloads":    {old, "no bzImage of Linux 2.6.26 or newer"},
		"another size":       {bzImageOf(t, sized(xzKernel, tinyKernel+"s")), "the kernel in it has 19 bytes, and its header says 20"},
		"an empty payload":   {bzImageOf(t, ""), "no bzImage"},
		"a block too large":  {bzImageOf(t, lz4Magic+"\xff\xff\xff\x7f"+strings.Repeat("x", 100)), "block of 2147483647 bytes is too large"},
		"a block cut short":  {bzImageOf(t, lz4Magic+"\x00\x01\x00\x00"+strings.Repeat("x", 100)), "unexpected EOF"},
		"a block of nothing": {bzImageOf(t, sized(lz4Magic+strings.Repeat("\x00", 400), tinyKernel)), "has 0 bytes"},
	} {
		if err := unpackBzImage(io.Discard, bytes.NewReader(c.image)); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v, want %q", name, err, c.says)
		}
	}
	if err := unpackBzImage(io.Discard, bytes.NewReader(bzImageOf(t, "\x89LZO and more"))); !errors.Is(err, errBootAsIs) {
		t.Errorf("lzo: %v, want errBootAsIs", err)
	}
}

// TestUnpacked unpacks an image in a directory, and in memory. Neither may happen if the image
// is no more the one that the fingerprint is of.
func TestUnpacked(t *testing.T) {
	dir := t.TempDir()
	vmlinuz := filepath.Join(dir, "vmlinuz")
	image := bzImageOf(t, sized(xzKernel, tinyKernel))
	if err := os.WriteFile(vmlinuz, image, 0o600); err != nil {
		t.Fatal(err)
	}
	sum, _, err := digest(bytes.NewReader(image))
	if err != nil {
		t.Fatal(err)
	}
	k := kernel{path: vmlinuz, digest: sum, form: bzImage}
	for name, cache := range map[string]string{"kept": filepath.Join(dir, "cache"), "in memory": ""} {
		for range 2 { // unpacked, and found
			b, err := k.unpacked(cache)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if (b.path == "") != (cache == "") {
				t.Errorf("%s: the kernel is at %q", name, b.path)
			}
			got := content(t, func() (*os.File, error) {
				if b.path == "" {
					return b.memory, nil
				}
				return os.Open(b.path)
			})
			if got != tinyKernel {
				t.Errorf("%s: %q", name, got)
			}
		}
	}
	other := k
	other.digest = strings.Repeat("0", 64)
	if _, err := other.unpacked(""); !errors.Is(err, errReplaced) || !errors.Is(err, ErrUnavailable) || !strings.HasSuffix(err.Error(), "it was replaced meanwhile; try again") {
		t.Errorf("another image of that name: %v", err)
	}
	if err := os.WriteFile(vmlinuz, bzImageOf(t, "\x89LZO and more"), 0o600); err != nil {
		t.Fatal(err)
	}
	if b, err := other.unpacked(filepath.Join(dir, "cache")); err != nil || b.path != vmlinuz {
		t.Errorf("a kernel in an unknown format is at %q: %v", b.path, err)
	}
}

func TestBannerVersion(t *testing.T) {
	const piece = 64 << 10 // that is read at once
	for name, c := range map[string]struct{ image, want string }{
		"in the middle":        {strings.Repeat("x", piece/2) + "Linux version 6.1.0-56-cloud-amd64 (builder) more", "6.1.0-56-cloud-amd64"},
		"between two pieces":   {strings.Repeat("x", piece-3) + "Linux version 6.1.0 (builder)", "6.1.0"},
		"cut in the release":   {strings.Repeat("x", piece-16) + "Linux version 6.1.0 (builder)", "6.1.0"},
		"in a later piece":     {strings.Repeat("x", 3*piece) + "Linux version 6.1.0 (builder)", "6.1.0"},
		"none":                 {strings.Repeat("x", 3*piece), ""},
		"none in little":       {"x", ""},
		"without an end":       {"Linux version 6.1.0", ""},
		"longer than any name": {"Linux version " + strings.Repeat("6", 100) + " ", ""},
	} {
		got, err := bannerVersion(strings.NewReader(c.image))
		if got != c.want || (err == nil) != (c.want != "") {
			t.Errorf("%s: %q, %v, want %q", name, got, err, c.want)
		}
	}
}

// BenchmarkUnpack shows how much memory a kernel of 8 MiB takes to unpack. For zstd it is the
// window, of which only what is used is resident.
func BenchmarkUnpack(b *testing.B) {
	for name, payload := range payloads(b, largeKernel, maxWindow) {
		image := bzImageOf(b, payload)
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			b.SetBytes(int64(len(largeKernel)))
			for b.Loop() {
				if err := unpackBzImage(io.Discard, bytes.NewReader(image)); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
