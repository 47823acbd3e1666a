// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package content

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"sync"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/internal/failpoint"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/tmpfile"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/logs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/watchedlist"
)

const (
	// retryAfter is how long a failure counts. A registry that is down is not asked by each of the pods that
	// kubelet starts again and again.
	retryAfter = 10 * time.Second
	// maxAnswers is how many are remembered: some for each content, as files are replaced.
	maxAnswers = 4 * watchedlist.MaxEntries
	// maxState is more than the file of so many takes, in bytes.
	maxState = 4 * size.MiB
)

// answer is the digest of one source, and how it was found out.
type answer struct {
	digest string    // empty if there was none yet
	given  time.Time // zero if it is of an earlier process
	err    error     // of the last try; nil after a success
	tried  time.Time // when the last try ended
	trying bool
}

// answers find out digests in the background, and remember them.
type answers struct {
	ctx    context.Context
	state  string
	saving sync.Mutex // held while the state is written
	tries  sync.WaitGroup

	mu    sync.Mutex
	of    map[string]*answer
	ended chan struct{} // is closed, and replaced, when a try ends
}

func newAnswers(ctx context.Context, state string) *answers {
	a := &answers{ctx: ctx, state: state, of: map[string]*answer{}, ended: make(chan struct{})}
	for key, digest := range load(state) {
		a.of[key] = &answer{digest: digest}
	}
	return a
}

// ask returns the digest of a source, or starts to find it out. key names the source and, of a file, its
// version. life is how long a digest counts before it is asked for again; 0 means forever. A digest of an
// earlier process counts at once if it has no life, and else only when its source cannot be asked.
func (a *answers) ask(key string, life time.Duration, find func(context.Context) (string, error)) (string, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	got := a.of[key]
	if got == nil {
		a.forgetOldest()
		got = &answer{}
		a.of[key] = got
	}
	now := time.Now()
	known := got.digest != ""
	fresh := known && (life == 0 || !got.given.IsZero() && now.Sub(got.given) < life)
	if !fresh && !got.trying && now.Sub(got.tried) >= retryAfter {
		got.trying = true
		a.tries.Go(func() { a.try(key, got, find) })
	}
	switch {
	case known && (life == 0 || !got.given.IsZero() || got.err != nil):
		return got.digest, nil
	case got.trying:
		return "", ErrResolving
	}
	return "", got.err
}

// try finds out one digest.
func (a *answers) try(key string, got *answer, find func(context.Context) (string, error)) {
	digest, err := find(a.ctx)
	if err == nil && !isDigest.MatchString(digest) {
		err = fmt.Errorf("%w: %.80q is no digest", ErrUnavailable, digest)
	}
	a.mu.Lock()
	now := time.Now()
	got.trying, got.tried, got.err = false, now, err
	changed := err == nil && got.digest != digest
	if err == nil {
		got.digest, got.given, got.tried = digest, now, time.Time{}
	}
	close(a.ended)
	a.ended = make(chan struct{})
	a.mu.Unlock()
	if changed {
		a.save()
	}
	if err != nil && a.ctx.Err() == nil {
		logs.Warn("The digest of a content was not found out", "source", key, "err", err)
	}
}

// wait waits until a try ends, whichever, or ctx.
func (a *answers) wait(ctx context.Context) error {
	a.mu.Lock()
	ended := a.ended
	a.mu.Unlock()
	// What was asked for may have ended before this. Then nothing else may end for a long time.
	again := time.NewTimer(100 * time.Millisecond)
	defer again.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-a.ctx.Done():
		return context.Cause(a.ctx)
	case <-ended:
	case <-again.C:
	}
	return nil
}

// known returns the digest of a source, or "" if it was not found out yet.
func (a *answers) known(key string) string {
	a.mu.Lock()
	defer a.mu.Unlock()
	if got := a.of[key]; got != nil {
		return got.digest
	}
	return ""
}

// failure returns why a source could not be asked the last time.
func (a *answers) failure(key string) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if got := a.of[key]; got != nil {
		return got.err
	}
	return nil
}

// forget makes sure that a digest is found out anew: it was found to be wrong.
func (a *answers) forget(key string) {
	a.mu.Lock()
	got := a.of[key]
	if got != nil && !got.trying {
		delete(a.of, key)
	}
	a.mu.Unlock()
	a.save()
}

// forgetOldest makes room for one more.
func (a *answers) forgetOldest() {
	if len(a.of) < maxAnswers {
		return
	}
	var oldest string
	for key, got := range a.of {
		if !got.trying && (oldest == "" || got.given.Before(a.of[oldest].given)) {
			oldest = key
		}
	}
	delete(a.of, oldest)
}

// saved is what outlives the process. It is not needed: a digest can be found out again, at the price of
// reading the file, or of a registry that answers.
type saved struct {
	Version int               `json:"version"`
	Digests map[string]string `json:"digests"`
}

const savedVersion = 1

var isDigest = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)

// save writes the digests to the file of the state.
func (a *answers) save() {
	if a.state == "" {
		return
	}
	a.saving.Lock()
	defer a.saving.Unlock()
	text, err := json.Marshal(saved{savedVersion, a.digests()})
	if err == nil {
		err = writeFile(a.state, text)
	}
	if err != nil {
		logs.Warn("The digests of contents were not saved; they are found out again after a restart", "err", err)
	}
}

func (a *answers) digests() map[string]string {
	a.mu.Lock()
	defer a.mu.Unlock()
	digests := map[string]string{}
	for key, got := range a.of {
		if got.digest != "" {
			digests[key] = got.digest
		}
	}
	return digests
}

// load reads what [answers.save] has written. What cannot be read is left out.
func load(path string) map[string]string {
	if path == "" {
		return nil
	}
	s, err := read(path)
	if err != nil {
		if !errors.Is(err, os.ErrNotExist) {
			logs.Warn("The digests of contents were not read; they are found out again", "err", err)
		}
		return nil
	}
	for key, digest := range s.Digests {
		if !isDigest.MatchString(digest) {
			delete(s.Digests, key)
		}
	}
	return s.Digests
}

func read(path string) (s saved, err error) {
	f, err := os.Open(path)
	if err != nil {
		return s, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxState))
	if err != nil {
		return s, err
	}
	if err := json.Unmarshal(text, &s); err != nil || s.Version != savedVersion {
		return saved{}, fmt.Errorf("%s is damaged, or of another version", path)
	}
	return s, nil
}

// writeFile replaces a file in one step.
func writeFile(path string, text []byte) error {
	f, err := tmpfile.Create(filepath.Dir(path), 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	err = failpoint.Before("write")
	if err == nil {
		_, err = f.Write(text)
	}
	if err != nil {
		return err
	}
	return tmpfile.Replace(f, path)
}
