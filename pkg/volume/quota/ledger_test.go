// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package quota

import (
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
)

// TestLimits works in units of MiB, which the messages are in.
func TestLimits(t *testing.T) {
	const u = 1 << 20
	for name, c := range map[string]struct {
		limits   Limits
		ns, node usage
		size     int64
		says     []string // nil: it is allowed
	}{
		"no limit":                   {Limits{}, usage{1000, 1000}, usage{9000, 9000}, 1 << 32, nil},
		"the last volume":            {Limits{Volumes: 5}, usage{2, 2}, usage{4, 4}, 1, nil},
		"one volume too many":        {Limits{Volumes: 5}, usage{2, 2}, usage{5, 5}, 1, []string{"--max-inline-volumes 5", "has 5 inline", "2 of them", `"shop"`, "delete pods"}},
		"far too many":               {Limits{Volumes: 5}, usage{2, 2}, usage{50, 50}, 1, []string{"--max-inline-volumes 5", "has 50 inline"}},
		"the namespace's last":       {Limits{VolumesPerNamespace: 3}, usage{2, 2}, usage{50, 50}, 1, nil},
		"one too many of it":         {Limits{VolumesPerNamespace: 3}, usage{3, 3}, usage{50, 50}, 1, []string{"--max-inline-volumes-per-namespace 3", `"shop" has 3 inline`, "delete pods with inline volumes in this namespace"}},
		"the last byte":              {Limits{Bytes: 10 * u}, usage{1, 2}, usage{1, 7}, 3, nil},
		"one byte too many":          {Limits{Bytes: 10*u - 1}, usage{1, 2}, usage{1, 7}, 3, []string{"--max-inline-bytes", "7Mi", "2Mi", `"shop"`, "3Mi more", "ask for less"}},
		"the namespace's last byte":  {Limits{BytesPerNamespace: 10 * u}, usage{1, 7}, usage{9, 70}, 3, nil},
		"one byte too many of it":    {Limits{BytesPerNamespace: 10*u - 1}, usage{1, 7}, usage{9, 70}, 3, []string{"--max-inline-bytes-per-namespace", `"shop" has 7Mi`, "3Mi more"}},
		"its own fault comes first":  {Limits{Volumes: 5, VolumesPerNamespace: 3}, usage{3, 3}, usage{5, 5}, 1, []string{"--max-inline-volumes-per-namespace 3"}},
		"more than int64":            {Limits{Bytes: math.MaxInt64 - 1}, usage{1, 2}, usage{2048, 2047 << 32}, 1 << 32, []string{"--max-inline-bytes"}},
		"more than int64, unlimited": {Limits{}, usage{1, 2}, usage{2048, 2047 << 32}, 1 << 32, nil},
	} {
		t.Run(name, func(t *testing.T) {
			c.ns.bytes *= u
			c.node.bytes *= u
			err := c.limits.refuse("shop", c.size*u, c.ns, c.node)
			if c.says == nil {
				if err != nil {
					t.Error(err)
				}
				return
			}
			t.Log(err)
			if !errors.Is(err, errdefs.ErrLimit) {
				t.Fatalf("allowed, or the wrong error: %v", err)
			}
			for _, s := range c.says {
				if !strings.Contains(err.Error(), s) {
					t.Errorf("does not say %s", s)
				}
			}
		})
	}
}

func TestLimitOfSize(t *testing.T) {
	const gib = 1 << 30
	for _, c := range []struct {
		limit, size int64
		ok          bool
	}{{0, 1 << 60, true}, {100 * gib, 100 * gib, true}, {100 * gib, 100*gib + 1<<20, false}} {
		err := Limits{Size: c.limit}.CheckSize(c.size)
		if (err == nil) != c.ok {
			t.Errorf("%d of %d: %v", c.size, c.limit, err)
		}
		if c.ok {
			continue
		}
		t.Log(err)
		for _, s := range []string{"size", "102401Mi", "100Gi", "--max-inline-size"} {
			if !errors.Is(err, diskfs.ErrOutOfRange) || !strings.Contains(err.Error(), s) {
				t.Errorf("does not say %s: %v", s, err)
			}
		}
	}
}

// TestLedger reserves volumes, settles them, releases them, and reserves them again.
func TestLedger(t *testing.T) {
	l := newLedger(Limits{Volumes: 2})
	reserve := func(id string, ok bool) func() {
		t.Helper()
		release, err := l.Reserve(id, "shop", 1)
		if (err == nil) != ok || err != nil && !errors.Is(err, errdefs.ErrLimit) {
			t.Fatalf("%s: %v", id, err)
		}
		return release
	}
	has := func(n int) {
		t.Helper()
		if len(l.ids()) != n {
			t.Errorf("the ledger has %v", l.volumes)
		}
	}
	a := reserve("a", true)
	a()
	has(0)
	a = reserve("a", true)
	l.Settle("a")
	a() // the volume is settled, so this does nothing
	has(1)
	b := reserve("b", true)
	reserve("c", false)
	has(2)
	reserve("a", true) // it is entered already, and not counted twice
	l.Settle("a")
	b()
	b() // a second release does nothing
	has(1)
	reserve("c", true)
	l.Settle("c")
	reserve("b", false)
	l.Forget("a")
	l.Forget("a")
	reserve("b", true)
}

// TestRunningSums changes a ledger at random, and compares its sums with its volumes. The sizes
// are so large that a sum of int64 would overflow.
func TestRunningSums(t *testing.T) {
	dice := rand.New(rand.NewPCG(1, 2))
	l := newLedger(Limits{})
	releases := map[string]func(){}
	for step := range 20000 {
		id, namespace := fmt.Sprint(dice.IntN(20)), fmt.Sprint(dice.IntN(3))
		switch dice.IntN(4) {
		case 0, 1:
			release, err := l.Reserve(id, namespace, dice.Int64N(math.MaxInt64))
			if err != nil {
				t.Fatal(err)
			}
			releases[id] = release
		case 2:
			if release := releases[id]; release != nil {
				release()
			}
		case 3:
			l.Settle(id)
			if dice.IntN(2) == 0 {
				l.Forget(id)
			}
		}
		var node usage
		spaces := map[string]usage{}
		for _, e := range l.volumes {
			node = node.with(e.bytes)
			spaces[e.namespace] = spaces[e.namespace].with(e.bytes)
		}
		if got := l.node.usage(); got != node {
			t.Fatalf("step %d: the node has %v, and the sum says %v", step, node, got)
		}
		if len(l.spaces) != len(spaces) {
			t.Fatalf("step %d: there are sums of %d namespaces, and volumes of %d", step, len(l.spaces), len(spaces))
		}
		for name, has := range spaces {
			if got := l.spaces[name].usage(); got != has {
				t.Fatalf("step %d: namespace %s has %v, and its sum says %v", step, name, has, got)
			}
		}
	}
}

// BenchmarkReserve enters one more volume beside few and many.
func BenchmarkReserve(b *testing.B) {
	for _, volumes := range []int{10, 10000} {
		b.Run(fmt.Sprintf("beside-%d", volumes), func(b *testing.B) {
			l := newLedger(Limits{Volumes: 20000})
			for i := range volumes {
				if _, err := l.Reserve(fmt.Sprint(i), fmt.Sprint(i%10), 1<<30); err != nil {
					b.Fatal(err)
				}
			}
			for b.Loop() {
				release, err := l.Reserve("one more", "1", 1<<30)
				if err != nil {
					b.Fatal(err)
				}
				release()
			}
		})
	}
}
