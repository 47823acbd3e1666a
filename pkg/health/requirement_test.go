// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package health

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

// TestFindings checks what is said of requirements that are met, met in part, not met, and unknown.
func TestFindings(t *testing.T) {
	none := func() []Condition { return nil }
	requirements := []Requirement{
		{Name: "pool", Look: none, Good: func() string { return "it is there" }},
		{Name: "unknown", Look: none, Good: func() string { return "" }},
		{Name: "mkfs", Look: func() []Condition {
			return []Condition{{Code: "Lacks", Object: "mkfs.xfs", Text: "no mkfs.xfs"}, {Code: "Lacks", Object: "mkfs.btrfs", Text: "no mkfs.btrfs"}}
		}},
		{Name: "kvm", Look: func() []Condition {
			return []Condition{{Code: "NoKVM", Severity: Limited, Text: "no KVM", Cost: "it is slow", Remedy: "get KVM", StillReady: true}}
		}},
	}
	held := append(Look(requirements), Condition{Code: "Other", Text: "of no requirement", StillReady: true})
	found := Findings(requirements, held)
	var lines []string
	for _, f := range found {
		lines = append(lines, fmt.Sprintf("%s %s %s %s: %s", f.State, f.Requirement, f.Code, f.Object, f.Message()))
	}
	want := []string{
		"good pool  : it is there",
		"broken mkfs Lacks mkfs.xfs: no mkfs.xfs", "broken mkfs Lacks mkfs.btrfs: no mkfs.btrfs",
		"degraded kvm NoKVM : no KVM; it is slow: get KVM",
		"degraded  Other : of no requirement",
	}
	if !slices.Equal(lines, want) {
		t.Errorf("%q", lines)
	}
	for n, worst := range map[int]State{0: StateGood, 1: StateGood, 2: StateBroken, 5: StateBroken} {
		if got := Worst(found[:n]); got != worst {
			t.Errorf("the worst of %d is %s, not %s", n, got, worst)
		}
	}
	if got := Worst(found[3:]); got != StateDegraded {
		t.Errorf("the worst of the last is %s", got)
	}
	if acute := Acute(held); len(acute) != 3 {
		t.Errorf("acute are %+v", acute)
	}
}

// TestSeldomly checks that looks at a trial do not make it, and that none is made while another is under way.
func TestSeldomly(t *testing.T) {
	made, hung, goOn := 0, make(chan bool), make(chan bool)
	look := func() []Condition {
		made++
		if made == 3 {
			close(hung)
			<-goOn
		}
		return []Condition{{Code: fmt.Sprint(made)}}
	}
	often := 0
	all, try := Seldomly([]Requirement{
		{Name: "often", Look: func() []Condition { often++; return nil }},
		{Name: "seldom", Look: look, Seldom: true},
	})
	codes := func() (codes []string) {
		for _, c := range Look(all) {
			codes = append(codes, c.Requirement+c.Code)
		}
		return codes
	}
	if got := codes(); len(got) != 0 || made != 0 || often != 1 {
		t.Errorf("before the first trial: %q", got)
	}
	try(time.Hour)
	try(time.Hour) // the last is young
	if got := codes(); !slices.Equal(got, []string{"seldom1"}) {
		t.Errorf("after the first trial: %q", got)
	}
	try(0)
	if got := codes(); !slices.Equal(got, []string{"seldom2"}) {
		t.Errorf("after the second trial: %q", got)
	}
	done := make(chan bool)
	go func() { try(0); close(done) }()
	<-hung
	try(0) // does not wait for the one that hangs
	if got := codes(); !slices.Equal(got, []string{"seldom2"}) {
		t.Errorf("during the third trial: %q", got)
	}
	close(goOn)
	<-done
	if got := codes(); !slices.Equal(got, []string{"seldom3"}) {
		t.Errorf("after the third trial: %q", got)
	}
}

// TestSeldomlySaysThatItHangs: a trial that does not end is a condition after half a minute, until it ends.
func TestSeldomlySaysThatItHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		goOn := make(chan bool)
		look := func() []Condition { <-goOn; return nil }
		all, try := Seldomly([]Requirement{{Name: "disk", Look: look, Seldom: true, Code: PoolUnusable}})
		go try(0)
		time.Sleep(hangs - time.Second)
		if found := Look(all); len(found) != 0 {
			t.Errorf("before half a minute: %+v", found)
		}
		time.Sleep(time.Second)
		found := Look(all)
		if len(found) != 1 || found[0].Code != PoolUnusable || found[0].Requirement != "disk" || len(Unready(found)) != 1 || found[0].Remedy == "" {
			t.Errorf("after half a minute: %+v", found)
		}
		quiet, tryQuiet := Seldomly([]Requirement{{Name: "socket", Look: look, Seldom: true}})
		go tryQuiet(0)
		time.Sleep(2 * hangs)
		if found := Look(quiet); len(found) != 0 {
			t.Errorf("of what waits for no disk: %+v", found)
		}
		close(goOn)
		synctest.Wait()
		if found := Look(all); len(found) != 0 {
			t.Errorf("after it ended: %+v", found)
		}
	})
}

func TestAdvice(t *testing.T) {
	cause := errors.New("it is broken")
	err := fmt.Errorf("opening: %w", Advise(fmt.Errorf("the pool: %w", cause), "mend it"))
	if want := "opening: the pool: it is broken; mend it"; err.Error() != want || !errors.Is(err, cause) {
		t.Errorf("%v, want %s", err, want)
	}
	if text, remedy := Advice(err); text != "opening: the pool: it is broken" || remedy != "mend it" {
		t.Errorf("%q and %q", text, remedy)
	}
	if text, remedy := Advice(cause); text != "it is broken" || remedy != "" {
		t.Errorf("%q and %q", text, remedy)
	}
}
