// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package golden

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/internal/plain"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
)

const mib = 1 << 20

var noon = time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)

// held reads generations, each as NAME@NUMBER:MIB:MINUTE, used so many minutes after noon.
func held(t testing.TB, texts string) (all []Held) {
	t.Helper()
	for text := range strings.FieldsSeq(texts) {
		parts := strings.Split(text, ":")
		g, err := ParseGeneration(parts[0])
		var bytes, minute int
		if _, scan := fmt.Sscan(parts[1]+" "+parts[2], &bytes, &minute); err != nil || scan != nil {
			t.Fatal(text, err, scan)
		}
		all = append(all, Held{g, int64(bytes) * mib, noon.Add(time.Duration(minute) * time.Minute)})
	}
	return all
}

func names(gone []Held) string {
	var texts []string
	for _, h := range gone {
		texts = append(texts, h.Generation.String())
	}
	return strings.Join(texts, " ")
}

// TestAdmit checks what goes when one more generation is made, and in which order.
func TestAdmit(t *testing.T) {
	for _, test := range []struct {
		what   string
		limits Limits // in MiB
		all    string
		of     string
		mib    int64
		gone   string
	}{
		{"no limits", Limits{}, "a/x@1:10:0 a/x@2:10:1", "a/x", 10, ""},
		{"the first one", Limits{Generations: 1, Golden: 10, Owner: 10, All: 10}, "", "a/x", 10, ""},
		{"room for one more generation", Limits{Generations: 3}, "a/x@1:1:0 a/x@2:1:1 b/x@1:1:0", "a/x", 1, ""},
		{"a generation too many", Limits{Generations: 2}, "a/x@1:1:0 a/x@2:1:1 a/y@1:1:0 b/x@1:1:0", "a/x", 1, "a/x@1"},
		{"one generation", Limits{Generations: 1}, "a/x@3:1:0 a/y@1:1:0", "a/x", 1, "a/x@3"},
		{"the limit was lowered", Limits{Generations: 1}, "a/x@3:1:0 a/x@4:1:1 a/x@9:1:2", "a/x", 1, "a/x@3 a/x@4 a/x@9"},
		{"the clock was set back", Limits{Generations: 2}, "a/x@3:1:5 a/x@4:1:1", "a/x", 1, "a/x@3"},
		{"numbers are no text", Limits{Generations: 2}, "a/x@10:1:0 a/x@9:1:0", "a/x", 1, "a/x@9"},
		{"another's golden of the same name", Limits{Generations: 1}, "b/x@1:1:0 x@1:1:0", "a/x", 1, ""},

		{"room in the golden", Limits{Golden: 30}, "a/x@1:10:0 a/x@2:10:1 a/y@1:90:0", "a/x", 10, ""},
		{"its own previous generation counts", Limits{Golden: 30}, "a/x@1:21:0", "a/x", 10, "a/x@1"},
		{"as many as it takes", Limits{Golden: 30}, "a/x@1:10:0 a/x@2:10:1 a/x@3:10:2", "a/x", 20, "a/x@1 a/x@2"},
		{"all of it", Limits{Golden: 30}, "a/x@1:10:0 a/x@2:10:1", "a/x", 30, "a/x@1 a/x@2"},

		{"room in the namespace", Limits{Owner: 30}, "a/x@1:10:0 a/y@1:10:0 b/x@1:90:0", "a/x", 10, ""},
		{"its own previous generation first", Limits{Owner: 30}, "a/x@1:10:9 a/y@1:11:0", "a/x", 10, "a/x@1"},
		{"another's outdated one first", Limits{Owner: 30}, "a/y@1:10:5 a/y@2:10:0 a/z@1:10:0", "a/x", 10, "a/y@1"},
		{"then the least recently used", Limits{Owner: 30}, "a/y@1:10:5 a/z@1:10:4 a/w@7:10:6", "a/x", 20, "a/z@1 a/y@1"},
		{"none of a golden before an older one", Limits{Owner: 30}, "a/u@1:10:10 a/u@2:10:1 a/u@3:10:11 a/v@1:10:5 a/v@2:10:12",
			"a/x", 10, "a/v@1 a/u@1 a/u@2"},
		{"outdated by its own", Limits{Owner: 30}, "a/x@1:10:0 a/x@2:10:2 a/y@1:5:1 a/y@2:5:3", "a/x", 15, "a/x@1 a/y@1"},
		{"each shared golden is for itself", Limits{Owner: 30}, "x@1:30:0 y@1:30:0 a/x@1:30:0", "x", 10, "x@1"},
		{"a namespace called as a shared golden", Limits{Owner: 30}, "x@1:30:0", "x/x", 30, ""},

		{"room in all", Limits{All: 30}, "a/x@1:10:0 b/y@1:10:0", "c/x", 10, ""},
		{"the largest gives", Limits{All: 30}, "a/x@1:10:9 a/y@1:10:8 b/x@1:10:0", "c/x", 10, "a/y@1"},
		{"the largest gives outdated ones", Limits{All: 30}, "a/x@1:10:0 a/y@1:5:8 a/y@2:5:9 b/x@1:10:0", "c/x", 5, "a/y@1"},
		{"the largest is who commits", Limits{All: 30}, "a/x@1:15:9 b/x@1:10:0", "a/y", 10, "a/x@1"},
		{"a shared golden has a share", Limits{All: 30}, "x@1:10:0 y@1:10:0 a/x@1:10:0", "a/y", 10, "a/x@1"},
		{"several give in turn", Limits{All: 60}, "a/x@1:10:0 a/y@1:10:1 a/z@1:10:2 b/x@1:10:0 b/y@1:10:1 b/z@1:10:2", "c/x", 20,
			"b/x@1 a/x@1"},
		{"the previous generation, and no more", Limits{Generations: 1, All: 30}, "a/x@1:15:0 b/x@1:15:0", "a/x", 15, "a/x@1"},
	} {
		l := test.limits
		l.Golden, l.Owner, l.All = l.Golden*mib, l.Owner*mib, l.All*mib
		of, err := ParseName(test.of)
		if err != nil {
			t.Fatal(err)
		}
		all := held(t, test.all)
		for range 4 { // in any order
			gone, err := l.Admit(slices.Clone(all), of, test.mib*mib)
			if got := names(gone); err != nil || got != test.gone {
				t.Errorf("%s: %q goes, want %q: %v", test.what, got, test.gone, err)
			}
			rand.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
		}
	}
}

// TestAdmitRefuses checks what is said of a generation that is too large. None goes for it.
func TestAdmitRefuses(t *testing.T) {
	for _, test := range []struct {
		limits Limits // in MiB
		all    string
		of     string
		mib    int64
		says   string
	}{
		{Limits{Golden: 30, Owner: 20, All: 10}, "a/x@1:10:0", "a/x", 31,
			"golden a/x would have 31Mi, and a golden may have 30Mi (--golden-max-bytes); leave less in the volume, or raise that"},
		{Limits{Golden: 30, Owner: 20, All: 10}, "a/x@1:10:0", "x", 21, "golden x would have 21Mi, and a namespace, and a shared " +
			"golden, may have 20Mi (--golden-namespace-cache); leave less in the volume, or raise that"},
		{Limits{Golden: 30, Owner: 20, All: 10}, "a/x@1:10:0", "a/x", 11, "golden a/x would have 11Mi, and all goldens of a node may " +
			"have 10Mi (--golden-cache); leave less in the volume, or raise that"},
		{Limits{Generations: 1, All: 30}, "a/x@1:5:0 b/x@1:15:0 b/x@2:5:0", "a/x", 21,
			"golden a/x would have 21Mi; all goldens of this node may have 30Mi (--golden-cache), and the other namespaces have " +
				"no more than an equal share of it; leave less in the volume, or raise that"},
	} {
		l := test.limits
		l.Golden, l.Owner, l.All = l.Golden*mib, l.Owner*mib, l.All*mib
		of, err := ParseName(test.of)
		if err != nil {
			t.Fatal(err)
		}
		gone, err := l.Admit(held(t, test.all), of, test.mib*mib)
		if !errors.Is(err, errdefs.ErrLimit) || err.Error() != "limit reached: "+test.says || gone != nil {
			t.Errorf("%q goes, and is told %v\nwant limit reached: %s", names(gone), err, test.says)
			continue
		}
		for _, fault := range plain.Faults(err.Error()) {
			t.Errorf("%s: %v", fault, err)
		}
	}
}

// TestExpired counts from when a generation was used last.
func TestExpired(t *testing.T) {
	all := held(t, "a/x@1:1:0 a/x@2:1:30 b/y@1:1:29 y@1:1:60")
	now := noon.Add(time.Hour)
	for unused, want := range map[time.Duration]string{
		0: "", time.Minute: "a/x@1 a/x@2 b/y@1", 30 * time.Minute: "a/x@1 b/y@1", time.Hour: "", time.Hour - 1: "a/x@1",
	} {
		if got := names((Limits{Unused: unused}).Expired(all, now)); got != want {
			t.Errorf("after %s %q goes, want %q", unused, got, want)
		}
	}
}

// node is a simulated one, whose goldens are used and committed to.
type node struct {
	*rand.Rand
	t      *testing.T
	limits Limits
	all    []Held
	minute int
}

// bytesOf are the bytes of each owner.
func (n *node) bytesOf() map[string]int64 {
	has := map[string]int64{}
	for _, h := range n.all {
		has[h.owner()] += h.Bytes
	}
	return has
}

// commit makes a generation, and reports whether it was refused.
func (n *node) commit(of Name, bytes int64) (gone []Held, refused bool) {
	n.t.Helper()
	n.minute++
	gone, err := n.limits.Admit(n.all, of, bytes)
	if err != nil {
		if !errors.Is(err, errdefs.ErrLimit) || gone != nil {
			n.t.Fatalf("%q goes: %v", names(gone), err)
		}
		return nil, true
	}
	number := 0
	for _, h := range n.all {
		if h.Name == of {
			number = max(number, h.Number)
		}
	}
	n.all = slices.DeleteFunc(n.all, func(h Held) bool { return slices.Contains(gone, h) })
	n.all = append(n.all, Held{Generation{of, number + 1}, bytes, noon.Add(time.Duration(n.minute) * time.Minute)})
	n.Shuffle(len(n.all), func(i, j int) { n.all[i], n.all[j] = n.all[j], n.all[i] })
	return gone, false
}

// someone is one of some owners, with one of its goldens.
func (n *node) someone(owners int) Name {
	who := n.IntN(owners)
	if who%4 == 3 {
		return Name{"", fmt.Sprintf("shared-%d", who)}
	}
	return Name{fmt.Sprintf("ns-%d", who), fmt.Sprintf("g%d", n.IntN(3))}
}

// TestEqualShares has owners commit whatever they like. Whoever is within an equal share loses nothing and is never
// refused, the limits on all hold, and the newest generation of a golden goes last.
func TestEqualShares(t *testing.T) {
	for seed := range uint64(40) {
		n := &node{Rand: rand.New(rand.NewPCG(seed, 0)), t: t, limits: Limits{All: 1000}}
		owners := 1 + n.IntN(8)
		for range 400 {
			of, bytes := n.someone(owners), 1+n.Int64N(1+n.Int64N(1000))
			before, all := n.bytesOf(), slices.Clone(n.all)
			before[of.owner()] += bytes
			share := n.limits.All / int64(len(before))
			gone, refused := n.commit(of, bytes)
			if refused && bytes <= share {
				t.Fatalf("seed %d: %d bytes of %s are refused, and its share is %d: %v", seed, bytes, of, share, all)
			}
			left := before
			for _, h := range gone {
				if left[h.owner()] <= share {
					t.Fatalf("seed %d: %s goes for %d bytes of %s, and its owner has %d of %d: %v", seed, h.Generation, bytes, of,
						left[h.owner()], share, all)
				}
				left[h.owner()] -= h.Bytes
			}
			var sum int64
			for _, h := range n.all {
				sum += h.Bytes
			}
			if sum > n.limits.All {
				t.Fatalf("seed %d: %d bytes are kept", seed, sum)
			}
			for _, g := range gone {
				if i := slices.IndexFunc(n.all, func(h Held) bool { return h.Name == g.Name && h.Number < g.Number }); i >= 0 {
					t.Fatalf("seed %d: %s goes before %s", seed, g.Generation, n.all[i].Generation)
				}
			}
		}
	}
}

// TestWithinItsShare has one namespace that keeps within an equal share of all that there can be. Whatever the others
// commit, it keeps all that its own commits leave it.
func TestWithinItsShare(t *testing.T) {
	const owners = 6
	for seed := range uint64(40) {
		n := &node{Rand: rand.New(rand.NewPCG(seed, 1)), t: t}
		n.limits = Limits{All: 1000, Generations: 1 + n.IntN(3), Owner: 300 + n.Int64N(800), Golden: 300 + n.Int64N(800)}
		share := n.limits.All / (owners + 1)
		for range 300 {
			if n.IntN(3) > 0 {
				gone, _ := n.commit(n.someone(owners), 1+n.Int64N(1200))
				for _, h := range gone {
					if h.Namespace == "modest" {
						t.Fatalf("seed %d: %s goes", seed, h.Generation)
					}
				}
				continue
			}
			of := Name{"modest", fmt.Sprintf("g%d", n.IntN(2))}
			bytes := 1 + n.Int64N(share/int64(2*n.limits.Generations))
			gone, refused := n.commit(of, bytes)
			if refused {
				t.Fatalf("seed %d: %d bytes are refused", seed, bytes)
			}
			for _, h := range gone {
				if h.Namespace == "modest" && h.Name != of {
					t.Fatalf("seed %d: %s goes for %s", seed, h.Generation, of)
				}
			}
			if has := n.bytesOf()["modest"]; has > share {
				t.Fatalf("seed %d: the test has %d of %d", seed, has, share)
			}
		}
	}
}

// TestManyGo takes a moment, and not hours, where one namespace has filled everything with small generations.
func TestManyGo(t *testing.T) {
	const many = 6000
	var all []Held
	for i := range many {
		g := Generation{Name{"a", fmt.Sprintf("g%d", i/10)}, 1 + i%10}
		all = append(all, Held{g, 1, noon.Add(time.Duration(many-i) * time.Second)})
	}
	start := time.Now()
	gone, err := Limits{All: many}.Admit(all, Name{"b", "x"}, many/2)
	if took := time.Since(start); err != nil || len(gone) != many/2 || took > 20*time.Second {
		t.Errorf("%d go after %s: %v", len(gone), took, err)
	}
}
