// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package template

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
)

// watchKey is the key of what [Watch] keeps in a context.
type watchKey struct{}

// Watch returns a context whose [Store.Ensure] says what it waits for: watch is called with the key of the
// template, which may be empty, and with a function that says more at the moment; and with nil when it waits
// no longer.
func Watch(ctx context.Context, watch func(key string, what func() string)) context.Context {
	return context.WithValue(ctx, watchKey{}, watch)
}

// waits tells the watcher of ctx that its call waits, until done is called.
func waits(ctx context.Context, key string, what func() string) (done func()) {
	watch, ok := ctx.Value(watchKey{}).(func(string, func() string))
	if !ok {
		return func() {}
	}
	watch(key, what)
	return func() { watch(key, nil) }
}

// Build is a template that is being built, or whose last build failed.
type Build struct {
	Key   string
	Spec  diskfs.Spec
	Since time.Time // when the build was asked for, or when it failed
	What  string    // what it does or waits for
	Err   error     // why it failed; nil if it is under way
}

// keptFailures bounds the builds that are remembered as failed, and failureLife for how long: kubelet asks
// again within minutes as long as somebody wants the template.
const (
	keptFailures = 50
	failureLife  = time.Hour
)

// outcomes remember builds, by key.
type outcomes struct {
	mu     sync.Mutex
	under  map[string]Build
	failed map[string]Build
}

// begin notes a build. The function that it returns notes how the build ended.
func (o *outcomes) begin(key string, spec diskfs.Spec) (end func(error)) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.under == nil {
		o.under, o.failed = map[string]Build{}, map[string]Build{}
	}
	o.under[key] = Build{Key: key, Spec: spec, Since: time.Now()}
	return func(err error) {
		o.mu.Lock()
		defer o.mu.Unlock()
		delete(o.under, key)
		delete(o.failed, key)
		if err != nil && !errors.Is(err, ErrBuilding) {
			o.fail(Build{Key: key, Spec: spec, Since: time.Now(), Err: err})
		}
	}
}

// fail remembers a build that failed, and drops the oldest one if there are too many.
func (o *outcomes) fail(b Build) {
	byTime := func(a, b Build) int { return a.Since.Compare(b.Since) }
	if len(o.failed) >= keptFailures {
		delete(o.failed, slices.MinFunc(slices.Collect(maps.Values(o.failed)), byTime).Key)
	}
	o.failed[b.Key] = b
}

// Builds lists the builds of this process that are under way, and those that failed within the last hour and were
// not made up for: by key.
func (s *Store) Builds() []Build {
	s.outcomes.mu.Lock()
	all := slices.Collect(maps.Values(s.outcomes.under))
	for key, b := range s.outcomes.failed {
		if _, again := s.outcomes.under[key]; !again && time.Since(b.Since) < failureLife {
			all = append(all, b)
		}
	}
	s.outcomes.mu.Unlock()
	all = slices.DeleteFunc(all, func(b Build) bool { return b.Err != nil && s.exists(b.Key) }) // another process built it
	for i, b := range all {
		if b.Err == nil {
			all[i].What = s.waitsFor(b.Key, b.Spec)
		}
	}
	slices.SortFunc(all, func(a, b Build) int { return cmp.Compare(a.Key, b.Key) })
	return all
}
