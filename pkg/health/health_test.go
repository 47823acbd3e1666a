// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package health

import (
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestWatch checks since when conditions hold, and that each change is reported once.
func TestWatch(t *testing.T) {
	start := time.Now()
	var (
		hold    []Condition
		second  int
		changes []string
	)
	w := &Watch{
		Find:  func() []Condition { return slices.Clone(hold) },
		Now:   func() time.Time { return start.Add(time.Duration(second) * time.Second) },
		Began: func(c Condition) { changes = append(changes, "+"+c.Code+c.Object) },
		Ended: func(c Condition, lasted time.Duration) {
			changes = append(changes, fmt.Sprintf("-%s%s after %s", c.Code, c.Object, lasted))
		},
	}
	full, gone, edge := Condition{Code: "Full"}, Condition{Code: "Gone", Text: "gone"}, Condition{Code: "Edge", StillReady: true}
	qemu, kernel := Condition{Code: "Lacks", Object: "QEMU"}, Condition{Code: "Lacks", Object: "Kernel"}
	for n, step := range []struct {
		hold    []Condition
		since   []int
		changes string
	}{
		{nil, nil, ""},
		{[]Condition{full}, []int{1}, "+Full"},
		{[]Condition{full}, []int{1}, ""},
		{[]Condition{full, gone}, []int{1, 3}, "+Gone"},
		{[]Condition{{Code: "Gone", Text: "gone differently"}}, []int{3}, "-Full after 3s"},
		{[]Condition{gone, full}, []int{3, 5}, "+Full"}, // it had ended
		{nil, nil, "-Gone after 3s, -Full after 1s"},
		{[]Condition{gone}, []int{7}, "+Gone"},
		{[]Condition{qemu}, []int{8}, "-Gone after 1s, +LacksQEMU"},
		{[]Condition{qemu, kernel}, []int{8, 9}, "+LacksKernel"},
		{[]Condition{kernel}, []int{9}, "-LacksQEMU after 2s"}, // one code, and not the same condition
		{[]Condition{kernel, kernel}, []int{9, 9}, ""},
		{nil, nil, "-LacksKernel after 3s"},
		{[]Condition{edge}, []int{13}, "+Edge"},
		{nil, nil, ""}, // it comes and goes
		{[]Condition{edge}, []int{13}, ""},
		{nil, nil, ""},
		{[]Condition{gone}, []int{17}, "+Gone"},
		{[]Condition{gone}, []int{17}, "-Edge after 33s"}, // half a minute after it was seen last
	} {
		if n == 18 {
			n = 46
		}
		hold, second, changes = step.hold, n, nil
		got := w.Look()
		if len(got) != len(step.since) {
			t.Fatalf("second %d: %v", n, got)
		}
		for i, c := range got {
			if want := start.Add(time.Duration(step.since[i]) * time.Second); !c.Since.Equal(want) {
				t.Errorf("second %d: %s since %v, want second %d", n, c.Code, c.Since.Sub(start), step.since[i])
			}
			got[i] = Condition{} // must not be the Watch's own
		}
		if c := strings.Join(changes, ", "); c != step.changes {
			t.Errorf("second %d: the changes are %q, want %q", n, c, step.changes)
		}
	}
}

// TestWatchByMany has many look at once: they see a condition begin and end once.
func TestWatchByMany(t *testing.T) {
	var began, ended int // under the lock of the Watch
	hold := true
	w := &Watch{
		Find: func() []Condition {
			if !hold {
				return nil
			}
			return []Condition{{Code: "Full"}}
		},
		Began: func(Condition) { began++ },
		Ended: func(Condition, time.Duration) { ended++ },
	}
	for _, now := range []bool{true, false} {
		hold = now
		var wait sync.WaitGroup
		for range 20 {
			wait.Go(func() { w.Look() })
		}
		wait.Wait()
	}
	if began != 1 || ended != 1 {
		t.Errorf("it began %d times and ended %d times", began, ended)
	}
}

// TestCodesAreDocumented compares the codes with the table in the documents.
func TestCodesAreDocumented(t *testing.T) {
	b, err := os.ReadFile("../../docs/operating.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(b), "\n## Conditions\n")
	section, _, _ = strings.Cut(section, "\n## ")
	var documented []string
	for _, m := range regexp.MustCompile("(?m)^\\| `(\\w+)` \\|").FindAllStringSubmatch(section, -1) {
		documented = append(documented, m[1])
	}
	slices.Sort(documented)
	if want := slices.Sorted(slices.Values(Codes)); !slices.Equal(documented, want) {
		t.Errorf("docs/operating.md has the codes %q, the plugin %q", documented, want)
	}
}

func TestErr(t *testing.T) {
	if err := Err(nil); err != nil {
		t.Error(err)
	}
	err := Err([]Condition{{Code: "A", Text: "a is broken", Remedy: "mend a"}, {Code: "B", Text: "b is"}})
	if want := "A: a is broken: mend a\nB: b is"; err == nil || err.Error() != want {
		t.Errorf("%v, want %q", err, want)
	}
}

func TestUnready(t *testing.T) {
	a, b := Condition{Code: "A"}, Condition{Code: "B", StillReady: true}
	if got := Unready([]Condition{b, a, b}); len(got) != 1 || got[0].Code != "A" {
		t.Errorf("got %v", got)
	}
	if got := Unready([]Condition{b}); got != nil {
		t.Errorf("got %v", got)
	}
}
