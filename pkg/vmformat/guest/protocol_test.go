// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"errors"
	"os"
	"reflect"
	"strings"
	"testing"
)

func TestVerdict(t *testing.T) {
	v := Verdict{Nonce: "n", OK: true, Stage: StageDone, UUID: "u", Written: 0}
	b, err := v.Marshal()
	if err != nil || len(b) != VerdictSize {
		t.Fatalf("%d bytes, %v", len(b), err)
	}
	if got, err := ParseVerdict(b, "n"); err != nil || got != v {
		t.Errorf("the verdict is read as %+v, %v", got, err)
	}
	for name, c := range map[string]struct {
		disk  []byte
		nonce string
	}{
		"never written":  {make([]byte, VerdictSize), "n"},
		"empty":          {nil, "n"},
		"another run":    {b, "other"},
		"cut":            {b[:40], "n"},
		"a flipped byte": {flip(b, 30), "n"},
		"a wild length":  {flip(b, 11), "n"},
	} {
		if got, err := ParseVerdict(c.disk, c.nonce); !errors.Is(err, ErrNoVerdict) || got.OK {
			t.Errorf("%s: read %+v, %v, want ErrNoVerdict", name, got, err)
		}
	}
}

func flip(b []byte, at int) []byte {
	c := append([]byte(nil), b...)
	c[at] ^= 0xff
	return c
}

// TestVerdictFits checks that a long output loses its beginning, not its end, which explains a
// failure.
func TestVerdictFits(t *testing.T) {
	for _, v := range []Verdict{
		{Nonce: "n", Output: strings.Repeat("x\n\x00\"", 5000) + "the end"},
		{Nonce: "n", Output: strings.Repeat("é", 5000) + "the end"},
		{Nonce: "n", Error: strings.Repeat("e", 9000)},
		{Nonce: "n", Error: strings.Repeat("e", 3000), Output: strings.Repeat("o", 3000) + "the end"},
	} {
		b, err := v.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		got, err := ParseVerdict(b, "n")
		if err != nil {
			t.Fatal(err)
		}
		if v.Output != "" && !strings.HasSuffix(got.Output, "the end") {
			t.Errorf("the output ends with %q", got.Output[max(0, len(got.Output)-20):])
		}
	}
	if _, err := (Verdict{Mkfs: strings.Repeat("m", 9000)}).Marshal(); err == nil {
		t.Error("a verdict that cannot be cut was accepted")
	}
}

func TestParseProgress(t *testing.T) {
	unpacking := Progress{StageUnpack, 512, 2048}
	for line, want := range map[string]struct {
		progress Progress
		job      int
	}{
		"  " + StagePrefix + "mkfs 3\r":       {Progress{Stage: StageMkfs}, 3},
		StagePrefix + "ready":                 {Progress{Stage: StageReady}, 0},
		StagePrefix + "check 99999":           {Progress{Stage: StageCheck}, 0},
		StagePrefix + "check -1":              {Progress{Stage: StageCheck}, 0},
		StagePrefix + "check three more":      {Progress{Stage: StageCheck}, 0},
		unpacking.line(2):                     {unpacking, 2},
		StagePrefix + "unpack 0 4096 2048":    {Progress{StageUnpack, 2048, 2048}, 0},
		StagePrefix + "unpack 0 -1 2048":      {Progress{StageUnpack, 0, 2048}, 0},
		StagePrefix + "unpack 0 512":          {Progress{Stage: StageUnpack}, 0},
		StagePrefix + "unpack 0 512 -2048":    {Progress{Stage: StageUnpack}, 0},
		StagePrefix + "unpack 0 512 2048 and": {unpacking, 0},
	} {
		if p, job, ok := ParseProgress(line); !ok || p != want.progress || job != want.job {
			t.Errorf("%q is read as %+v of job %d, %v", line, p, job, ok)
		}
	}
	if _, _, ok := ParseProgress("mkfs 3"); ok {
		t.Error("a line without the prefix is read as progress")
	}
}

// TestBatch reads a batch back. A damaged one is refused.
func TestBatch(t *testing.T) {
	batch := Batch{Seed: []byte{1}, Time: 2, Orders: []Order{{Nonce: "n", Job: Job{Filesystem: "ext4", Mkfs: []string{"mkfs", DevicePlaceholder}}}}}
	b, err := batch.Marshal()
	if err != nil || len(b) != BatchSize {
		t.Fatalf("%d bytes, %v", len(b), err)
	}
	if got, err := ParseBatch(b); err != nil || !reflect.DeepEqual(got, batch) {
		t.Errorf("the batch is read as %+v, %v", got, err)
	}
	verdict, err := Verdict{Nonce: "n"}.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	crowded, err := Batch{Orders: make([]Order, MaxJobs+1)}.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	for name, disk := range map[string][]byte{"empty": nil, "zeros": make([]byte, BatchSize), "a verdict": verdict, "a flipped byte": flip(b, 30), "too many orders": crowded} {
		if got, err := ParseBatch(disk); err == nil {
			t.Errorf("%s: it is read as %+v", name, got)
		}
	}
	long := Batch{Orders: []Order{{Nonce: strings.Repeat("n", BatchSize)}}}
	if _, err := long.Marshal(); err == nil {
		t.Error("a batch that does not fit was accepted")
	}
}

// TestIsInit checks that a process outside a VM is not init. A plugin is PID 1 in its container
// all the same.
func TestIsInit(t *testing.T) {
	if IsInit() || os.Args[0] == InitPath {
		t.Error("the test believes that it runs in a formatting VM")
	}
}
