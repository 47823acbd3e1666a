// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"

	"golang.org/x/sync/singleflight"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/template"
)

var (
	// ErrInvalid means that a request asks for what cannot be.
	ErrInvalid = errors.New("invalid request")
	// ErrExists means that the volume, or something else at the target, is there
	// already and is not what was asked for.
	ErrExists = errors.New("already exists and is different")
	// ErrNotFound means that there is no such volume, or not at that path.
	ErrNotFound = errors.New("volume not found")
	// ErrUnderWay means that the caller's time ended before the work did, which goes
	// on: asking again joins it.
	ErrUnderWay = errors.New("still under way")
	// ErrState means that the node is not in the state the operation needs, and
	// that somebody has to change that.
	ErrState = errors.New("operation not possible in this state")
)

// Config is what a Manager works with.
type Config struct {
	Pool      *pool.Pool      // required
	Templates *template.Store // required, but for Sweep
	// TargetRoot is the directory below which volumes are staged and published,
	// and outside of which nothing is ever touched: the kubelet's. Required.
	TargetRoot string
	// Grow makes the filesystem on a block device, which nobody has mounted, as
	// large as the device: for those that cannot grow while they are mounted. nil
	// leaves them as they are.
	Grow func(ctx context.Context, fs *diskfs.Filesystem, device string) error
	// Headroom is what new volumes leave free of the pool; the zero value is
	// nothing.
	Headroom size.Share
	// Overcommit is how many times its own size the pool promises to thin claims;
	// 0 is 1.
	Overcommit float64
	// Limits are those of inline volumes; the zero value is none.
	Limits Limits
}

// Manager has the volumes of a pool.
type Manager struct {
	pool      *pool.Pool
	templates *template.Store
	grow      func(ctx context.Context, fs *diskfs.Filesystem, device string) error
	loops     loopdev.Allocator
	space     space
	ledger    ledger
	freezing  freezing
	rootPath  string          // as the container orchestrator spells it
	mountPath string          // of root as the mount table spells it
	root      *os.File        // of rootPath
	reported  map[string]bool // of what the last Sweep left

	// Work that outlives the call that asked for it, until Close.
	ctx     context.Context
	cancel  context.CancelFunc
	work    singleflight.Group
	working sync.WaitGroup
}

// NewManager returns a Manager. What an earlier process of the same pool may have left
// undone is for [Manager.Sweep].
func NewManager(c Config) (*Manager, error) {
	path, err := filepath.Abs(c.TargetRoot)
	if err != nil {
		return nil, err
	}
	root, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("opening the directory below which volumes are published: %w; set --kubelet-dir to the kubelet's root directory", err)
	}
	resolved, err := filepath.EvalSymlinks(path)
	if err != nil {
		root.Close()
		return nil, err
	}
	m := &Manager{
		pool: c.Pool, templates: c.Templates, grow: c.Grow, rootPath: path, mountPath: resolved, root: root,
		space:    space{headroom: c.Headroom, overcommit: cmp.Or(c.Overcommit, 1)},
		ledger:   ledger{limits: c.Limits, volumes: map[string]entry{}},
		freezing: defaultFreezing,
	}
	m.ctx, m.cancel = context.WithCancel(context.Background())
	if err := m.recount(); err != nil {
		root.Close()
		return nil, err
	}
	return m, nil
}

// Close ends what is under way, of which nothing stays, and lets go of what the
// Manager holds open. Volumes stay as they are.
func (m *Manager) Close() error {
	m.cancel()
	m.working.Wait()
	return m.root.Close()
}

// outlive does work that may take longer than its caller has time, once for all who
// ask for it by the same key meanwhile.
func outlive[T any](ctx context.Context, m *Manager, key string, do func(context.Context) (T, error)) (T, error) {
	m.working.Add(1)
	done := m.work.DoChan(key, func() (any, error) { return do(m.ctx) })
	result := make(chan singleflight.Result, 1)
	go func() {
		defer m.working.Done()
		result <- <-done
	}()
	select {
	case r := <-result:
		return r.Val.(T), r.Err
	case <-ctx.Done():
		var none T
		return none, fmt.Errorf("%w: %s: %w; try again, it goes on meanwhile", ErrUnderWay, key, context.Cause(ctx))
	}
}

// maxID is the limit of CSI for every identifier ("Size Limits"), in bytes.
const maxID = 128

var idPattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]*$`)

// CheckID reports whether id can be the name of a volume. An id becomes the name
// of a file, so it is held to characters that need no escaping there.
func CheckID(id string) error {
	switch {
	case id == "":
		return fmt.Errorf("%w: volume id: must not be empty", ErrInvalid)
	case len(id) > maxID:
		return fmt.Errorf("%w: volume id %.32q…: has %d bytes, at most %d are allowed", ErrInvalid, id, len(id), maxID)
	case !idPattern.MatchString(id):
		return fmt.Errorf("%w: volume id %q: must start with a letter or digit and continue with letters, digits, '.', '_' or '-'", ErrInvalid, id)
	}
	return nil
}

// relative returns target's path below the target root.
func (m *Manager) relative(target string) (string, error) {
	if strings.ContainsRune(target, 0) {
		return "", fmt.Errorf("%w: target path %q: must not contain NUL", ErrInvalid, target)
	}
	if !filepath.IsAbs(target) || filepath.Clean(target) != strings.TrimSuffix(target, "/") {
		return "", fmt.Errorf("%w: target path %q: must be absolute, without '.' or '..'", ErrInvalid, target)
	}
	rel, err := filepath.Rel(m.rootPath, target)
	if err != nil || rel == "." || rel == ".." || strings.HasPrefix(rel, "../") {
		return "", fmt.Errorf("%w: target path %q: must lie below %s (see --kubelet-dir)", ErrInvalid, target, m.rootPath)
	}
	return rel, nil
}
