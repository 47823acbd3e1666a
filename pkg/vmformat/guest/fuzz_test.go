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

// FuzzVerdict reads verdict disks. Only one that is whole and of this run is one; what
// the guest writes is read as it meant it, and not with one bit turned.
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
			t.Errorf("%+v: %v", v, err)
		}
		if s, ok := ParseStage(string(disk)); ok && !strings.Contains(string(disk), StagePrefix+string(s)) {
			t.Errorf("%q announces %q: %v", disk, s, ok)
		}

		if !utf8.ValidString(nonce) {
			return // it is hexadecimal
		}
		said := Verdict{Nonce: nonce, OK: bit&1 == 0, Stage: StageMkfs, ExitCode: int(bit), Error: reason, Output: output, UUID: "u", Written: 8}
		b, err := said.Marshal()
		if err != nil { // what cannot be cut is too long
			if len(nonce) < VerdictSize/8 {
				t.Error(err)
			}
			return
		}
		if len(b) != VerdictSize {
			t.Fatalf("%d bytes", len(b))
		}
		heard, err := ParseVerdict(b, nonce)
		if err != nil {
			t.Fatal(err)
		}
		// A cut may part a character.
		if valid(output) && valid(reason) && (!strings.HasSuffix(output, strings.TrimLeft(heard.Output, "\ufffd")) ||
			!strings.HasPrefix(reason, strings.TrimRight(heard.Error, "\ufffd"))) {
			t.Errorf("said %q and %q, heard %q and %q", output, reason, heard.Output, heard.Error)
		}
		heard.Output, heard.Error, said.Output, said.Error = "", "", "", ""
		if heard != said {
			t.Errorf("said %+v, heard %+v", said, heard)
		}
		if _, err := ParseVerdict(b, nonce+"x"); err == nil {
			t.Error("it is of any run")
		}
		// CRC-32 finds every single bit; of the length's, those that matter.
		used := verdictHeader + int(binary.LittleEndian.Uint32(b[8:]))
		at := int(bit) % (8 * used)
		b[at/8] ^= 1 << (at % 8)
		if v, err := ParseVerdict(b, nonce); err == nil {
			t.Errorf("bit %d turned: %+v", at, v)
		}
	})
}

func valid(s string) bool { return utf8.ValidString(s) && !strings.Contains(s, "\ufffd") }

// whole reads an accepted disk once more, step by step.
func whole(t *testing.T, disk []byte, v Verdict, nonce string) {
	t.Helper()
	if !bytes.HasPrefix(disk, verdictMagic[:]) || v.Nonce != nonce {
		t.Fatalf("accepted %+v", v)
	}
	body := disk[verdictHeader:][:binary.LittleEndian.Uint32(disk[8:])]
	var again Verdict
	if err := json.Unmarshal(body, &again); err != nil || again != v ||
		crc32.Checksum(body, crc32.MakeTable(crc32.Castagnoli)) != binary.LittleEndian.Uint32(disk[12:]) {
		t.Errorf("accepted %+v of %q: %v", v, body, err)
	}
}
