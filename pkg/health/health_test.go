// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package health

import (
	"testing"
	"time"
)

func TestWatch(t *testing.T) {
	var w Watch
	at := func(n int) time.Time { return time.Unix(int64(n), 0) }
	full, gone := Condition{Code: "PoolFull"}, Condition{Code: "PoolUnusable"}
	qemu, kernel := Condition{Code: "FormatterUnavailable", Object: "QEMU"}, Condition{Code: "FormatterUnavailable", Object: "kernel"}
	for n, step := range []struct {
		hold []Condition
		want []int
	}{
		{[]Condition{full}, []int{0}},
		{[]Condition{full, gone}, []int{0, 1}},
		{[]Condition{gone}, []int{1}},
		{[]Condition{gone, full}, []int{1, 3}}, // full had ended
		{nil, nil},
		{[]Condition{gone}, []int{5}},
		{[]Condition{qemu}, []int{6}},
		{[]Condition{qemu, kernel}, []int{6, 7}},
		{[]Condition{kernel}, []int{7}}, // one code, and not the same condition
	} {
		got := w.Stamp(step.hold, at(n))
		if len(got) != len(step.want) {
			t.Fatalf("step %d: %v", n, got)
		}
		for i, c := range got {
			if !c.Since.Equal(at(step.want[i])) {
				t.Errorf("step %d: %s since %v, want %v", n, c.Code, c.Since, at(step.want[i]))
			}
		}
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
