// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package vmformat

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/vmformat/guest"
)

// TestFillCheck refuses archives that do not lie within their file.
func TestFillCheck(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "archives"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(2048); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		layers []guest.Layer
		good   bool
	}{
		"two":       {[]guest.Layer{{Length: 1024}, {Offset: 1024, Length: 1024}}, true},
		"none":      {nil, false},
		"too long":  {[]guest.Layer{{Offset: 1024, Length: 1025}}, false},
		"too far":   {[]guest.Layer{{Offset: 2049}}, false},
		"before":    {[]guest.Layer{{Offset: -1, Length: 1}}, false},
		"negative":  {[]guest.Layer{{Offset: 1, Length: -1}}, false},
		"very long": {[]guest.Layer{{Offset: 1, Length: 1<<63 - 1}}, false},
	} {
		if err := (&Fill{Archive: f, Layers: c.layers}).check(); (err == nil) != c.good {
			t.Errorf("%s: %v", name, err)
		}
	}
	if (*Fill)(nil).check() != nil || (*Fill)(nil).content() != nil || (*Fill)(nil).layers() != nil {
		t.Error("a filesystem that stays empty has a content")
	}
}

// TestGiven gives VMs memory and time for what they unpack, up to a bound.
func TestGiven(t *testing.T) {
	f, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, c := range []struct {
		entries, bytes int64
		most           int // MiB
	}{{0, 0, memoryMiB}, {200_000, 1 << 30, 1024}, {1 << 60, 1 << 30, maxMemoryMiB}} {
		v := &vm{memory: memoryMiB, timeout: DefaultTimeout}
		if err := v.give(&Fill{Archive: f, Entries: c.entries, Layers: []guest.Layer{{Length: c.bytes}}}); err != nil {
			t.Fatal(err)
		}
		v.close()
		if v.memory < memoryMiB || v.memory > c.most || v.addressSpace() != qemuAddressSpace+int64(v.memory-memoryMiB)<<20 {
			t.Errorf("%d entries: %d MiB of memory, %d of address space", c.entries, v.memory, v.addressSpace())
		}
		if none := c.entries == 0; (v.timeout == DefaultTimeout) != none || v.timeout < DefaultTimeout {
			t.Errorf("%d entries have %s", c.entries, v.timeout)
		}
	}
}
