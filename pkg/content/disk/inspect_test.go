// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package disk

import (
	"bytes"
	"encoding/binary"
	"errors"
	"strings"
	"testing"
)

// header is that of a qcow2 that is accepted, with changes.
func header(t testing.TB, change func(h *qcow2Header), extensions ...byte) []byte {
	t.Helper()
	h := qcow2Header{Version: 3, ClusterBits: 16, Size: 1 << 30, L1Size: 2, RefcountOrder: 4, HeaderLength: headerLength3}
	copy(h.Magic[:], qcowMagic)
	if change != nil {
		change(&h)
	}
	b, err := binary.Append(nil, binary.BigEndian, h)
	if err != nil {
		t.Fatal(err)
	}
	return append(append(b, extensions...), make([]byte, 4096)...)
}

func extension(kind uint32, content string) []byte {
	b := binary.BigEndian.AppendUint32(nil, kind)
	b = binary.BigEndian.AppendUint32(b, uint32(len(content)))
	b = append(b, content...)
	return append(b, make([]byte, (8-len(content)%8)%8)...)
}

func TestInspect(t *testing.T) {
	at := func(at int, magic string) []byte {
		b := make([]byte, 4096)
		copy(b[at:], magic)
		return b
	}
	const names = 0x6803f857 // a table of feature names, which QEMU writes
	named := append(extension(names, strings.Repeat("name", 13)), extension(extensionExternalData, "/etc/shadow")...)
	for name, tc := range map[string]struct {
		file    []byte
		virtual int64
		words   string
	}{
		"raw":            {at(0, "anything"), 4096, ""},
		"raw, odd":       {make([]byte, 1000), 1 << 20, ""},
		"iso":            {append(make([]byte, 32<<10), at(1, "CD001")...), 36 << 10, ""},
		"empty":          {nil, 0, "has 0 bytes"},
		"qcow2":          {header(t, nil), 1 << 30, ""},
		"qcow2, odd":     {header(t, func(h *qcow2Header) { h.Size = 1<<30 + 1 }), 1<<30 + 1<<20, ""},
		"version 2":      {header(t, func(h *qcow2Header) { h.Version = 2; h.HeaderLength = 0 })[:72], 1 << 30, ""},
		"dirty":          {header(t, func(h *qcow2Header) { h.Incompatible = 1 }), 1 << 30, ""},
		"feature names":  {header(t, nil, extension(names, strings.Repeat("x", 48))...), 1 << 30, ""},
		"snapshots":      {header(t, func(h *qcow2Header) { h.SnapshotCount = 3 }), 1 << 30, ""},
		"version 4":      {header(t, func(h *qcow2Header) { h.Version = 4 }), 0, "version 4"},
		"cut":            {header(t, nil)[:100], 0, "truncated"},
		"magic alone":    {[]byte(qcowMagic), 0, "version 0"},
		"backing":        {header(t, func(h *qcow2Header) { h.BackingOffset = 200 }), 0, "backing file"},
		"backing format": {header(t, nil, extension(extensionBacking, "raw")...), 0, "another file"},
		"external data":  {header(t, func(h *qcow2Header) { h.Incompatible = featureExternalData }), 0, "another file"},
		"hidden data":    {header(t, nil, named...), 0, "names another file"},
		"encrypted":      {header(t, func(h *qcow2Header) { h.Crypt = 2 }), 0, "encrypted"},
		"encryption":     {header(t, nil, extension(extensionEncryption, strings.Repeat("x", 16))...), 0, "encrypted"},
		"corrupt":        {header(t, func(h *qcow2Header) { h.Incompatible = featureCorrupt }), 0, "corrupt"},
		"unknown":        {header(t, func(h *qcow2Header) { h.Incompatible = 1 << 40 }), 0, "not known (0x"},
		"clusters":       {header(t, func(h *qcow2Header) { h.ClusterBits = 40 }), 0, "clusters of 2^40"},
		"table":          {header(t, func(h *qcow2Header) { h.L1Size = 1 << 31 }), 0, "a table of"},
		"no size":        {header(t, func(h *qcow2Header) { h.Size = 0 }), 0, "has 0 bytes"},
		"too large":      {header(t, func(h *qcow2Header) { h.Size = 1<<44 + 1 }), 0, "1 to 16Ti"},
		"negative":       {header(t, func(h *qcow2Header) { h.Size = 1 << 63 }), 0, "1 to 16Ti"},
		"long header":    {header(t, func(h *qcow2Header) { h.HeaderLength = 1 << 31 }), 0, "damaged"},
		"long extension": {header(t, nil, extension(names, strings.Repeat("x", 70_000))...), 0, "an extension of"},
		"gzip":           {at(0, "\x1f\x8b\x08"), 0, "decompress it"},
		"xz":             {at(0, "\xfd7zXZ\x00"), 0, "decompress it"},
		"zstd":           {at(0, "\x28\xb5\x2f\xfd"), 0, "decompress it"},
		"zip":            {at(0, "PK\x03\x04"), 0, "unpack it"},
		"tar":            {at(257, "ustar"), 0, "kind tar"},
		"fixed VHD":      {at(4096-512, "conectix"), 0, "VHD"},
	} {
		_, virtual, err := inspect(bytes.NewReader(tc.file), int64(len(tc.file)))
		switch {
		case tc.words == "" && (err != nil || virtual != tc.virtual):
			t.Errorf("%s has %d bytes, want %d: %v", name, virtual, tc.virtual, err)
		case tc.words != "" && (!errors.Is(err, ErrUnusable) || !strings.Contains(err.Error(), tc.words)):
			t.Errorf("%s: %v, want %q", name, err, tc.words)
		}
	}
}
