// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package template

import (
	"testing"
	"time"
)

// TestPatience checks when callers are answered.
func TestPatience(t *testing.T) {
	for left, want := range map[time.Duration]time.Duration{
		2 * time.Minute: 118 * time.Second, 10 * time.Second: 8 * time.Second, 4 * time.Second: 2 * time.Second,
		3 * time.Second: 1500 * time.Millisecond, 100 * time.Millisecond: 50 * time.Millisecond, 0: 0,
	} {
		if got := patience(left); got != want {
			t.Errorf("of %s it waits %s, want %s", left, got, want)
		}
	}
	if ctx, cancel := patient(t.Context()); ctx.Err() != nil {
		t.Error("who has no deadline waits for ever")
	} else {
		cancel()
	}
}

// TestQueue checks what is said of builds at each stage.
func TestQueue(t *testing.T) {
	now := time.Now()
	const took = 10 * time.Second
	under := func(ago time.Duration) *work { return &work{stage: building, since: now.Add(-ago)} }
	for name, c := range map[string]struct {
		slots  int
		others []*work
		work   *work
		want   look
	}{
		"unknown":                     {2, nil, nil, look{}},
		"another process":             {2, nil, &work{stage: locking}, look{stage: locking}},
		"just begun":                  {2, nil, under(0), look{building, 0, took}},
		"nearly done":                 {2, []*work{under(0)}, under(9 * time.Second), look{building, 0, time.Second}},
		"overdue":                     {2, nil, under(time.Minute), look{building, 0, 0}},
		"a slot is free":              {2, []*work{under(0)}, &work{stage: queued, number: 1}, look{queued, 0, took}},
		"one slot":                    {1, []*work{under(8 * time.Second)}, &work{stage: queued, number: 1}, look{queued, 1, 12 * time.Second}},
		"one slot, overdue":           {1, []*work{under(time.Minute)}, &work{stage: queued, number: 1}, look{queued, 1, took}},
		"the slot that is free first": {2, []*work{under(0), under(8 * time.Second)}, &work{stage: queued, number: 1}, look{queued, 2, 12 * time.Second}},
		"others before and after": {
			2, []*work{under(0), under(8 * time.Second), {stage: queued, number: 3}, {stage: queued, number: 5}, {stage: locking}},
			&work{stage: queued, number: 4}, look{queued, 3, 20 * time.Second},
		},
	} {
		q := queue{slots: c.slots, builds: map[string]*work{}, took: took, built: 1}
		for i, w := range append(c.others, c.work) {
			if w != nil {
				q.builds[string(rune('a'+i))] = w
			}
		}
		key := string(rune('a' + len(c.others)))
		if got := q.look(key, now); got != c.want {
			t.Errorf("%s: %+v, want %+v", name, got, c.want)
		}
		q.built, c.want.left = 0, 0
		if got := q.look(key, now); got != c.want {
			t.Errorf("%s, before the first build: %+v, want %+v", name, got, c.want)
		}
	}
}

// TestMean checks that the mean is exact at first, and follows a change later.
func TestMean(t *testing.T) {
	var q queue
	q.note(2 * time.Second)
	q.note(4 * time.Second)
	if q.took != 3*time.Second {
		t.Errorf("the mean of 2 and 4 s is %s", q.took)
	}
	for range 100 {
		q.note(3 * time.Second)
	}
	for range 16 {
		q.note(9 * time.Second)
	}
	if q.took < 8*time.Second || q.took > 9*time.Second {
		t.Errorf("after 16 builds of 9 s the mean is %s", q.took)
	}
}
