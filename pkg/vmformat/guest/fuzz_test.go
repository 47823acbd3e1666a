// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"hash/crc32"
	"strings"
	"testing"
	"unicode/utf8"
)

// FuzzVerdict reads verdict disks. Only a verdict that is whole and of this run is accepted. A
// verdict that the guest writes is read back unchanged, and refused if one bit is flipped.
func FuzzVerdict(f *testing.F) {
	good, err := Verdict{Nonce: "n", OK: true, Stage: StageDone}.Marshal()
	if err != nil {
		f.Fatal(err)
	}
	for _, b := range [][]byte{nil, good, good[:100], flip(good, 8), flip(good, 12), flip(good, 20)} {
		f.Add(b, "n", "out\n\x00", "e", uint16(77))
	}
	f.Add([]byte(StagePrefix+"mkfs\r"), "", strings.Repeat("é", 3000), strings.Repeat("\x01", 5000), uint16(0))
	f.Fuzz(func(t *testing.T, disk []byte, nonce, output, reason string, bit uint16) {
		if v, err := ParseVerdict(disk, nonce); err == nil {
			whole(t, disk, v, nonce)
		} else if !errors.Is(err, ErrNoVerdict) || v.OK && v.Nonce == nonce {
			t.Errorf("read %+v: %v", v, err)
		}
		p, job, ok := ParseProgress(string(disk))
		if ok && (job < 0 || job >= MaxJobs || p.Done > p.Total || !strings.Contains(string(disk), string(p.Stage))) {
			t.Errorf("%q is read as %+v", disk, p)
		}

		if !utf8.ValidString(nonce) {
			return // a nonce is hexadecimal
		}
		written := Verdict{Nonce: nonce, OK: bit&1 == 0, Stage: StageMkfs, ExitCode: int(bit), Error: reason, Output: output, UUID: "u", Written: 8}
		b, err := written.Marshal()
		if err != nil { // the parts that are not cut are too long
			if len(nonce) < VerdictSize/8 {
				t.Error(err)
			}
			return
		}
		if len(b) != VerdictSize {
			t.Fatalf("the verdict has %d bytes, want %d", len(b), VerdictSize)
		}
		read, err := ParseVerdict(b, nonce)
		if err != nil {
			t.Fatal(err)
		}
		shown := Verdict{Output: output, Error: reason}
		shown.show()
		// A cut may fall within a character.
		if valid(output) && valid(reason) && (!strings.HasSuffix(shown.Output, strings.TrimLeft(read.Output, "\ufffd")) ||
			!strings.HasPrefix(shown.Error, strings.TrimRight(read.Error, "\ufffd"))) {
			t.Errorf("wrote %q and %q, read %q and %q", output, reason, read.Output, read.Error)
		}
		read.Output, read.Error, written.Output, written.Error = "", "", "", ""
		if read != written {
			t.Errorf("wrote %+v, read %+v", written, read)
		}
		if _, err := ParseVerdict(b, nonce+"x"); err == nil {
			t.Error("a verdict of another run was accepted")
		}
		// CRC-32 finds every single flipped bit of the JSON, and every one that matters of the
		// header.
		used := header + int(binary.LittleEndian.Uint32(b[8:]))
		at := int(bit) % (8 * used)
		b[at/8] ^= 1 << (at % 8)
		if v, err := ParseVerdict(b, nonce); err == nil {
			t.Errorf("with bit %d flipped it is read as %+v", at, v)
		}
	})
}

func valid(s string) bool { return utf8.ValidString(s) && !strings.Contains(s, "\ufffd") }

// whole reads an accepted disk again, step by step.
func whole(t *testing.T, disk []byte, v Verdict, nonce string) {
	t.Helper()
	if !bytes.HasPrefix(disk, verdictMagic[:]) || v.Nonce != nonce {
		t.Fatalf("ParseVerdict accepted %+v", v)
	}
	body := disk[header:][:binary.LittleEndian.Uint32(disk[8:])]
	var again Verdict
	err := json.Unmarshal(body, &again)
	if again.show(); err != nil || again != v ||
		crc32.Checksum(body, crc32.MakeTable(crc32.Castagnoli)) != binary.LittleEndian.Uint32(disk[12:]) {
		t.Errorf("ParseVerdict accepted %+v from %q: %v", v, body, err)
	}
}
