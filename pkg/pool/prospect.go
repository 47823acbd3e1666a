// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package pool

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/health"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/fsctl"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
)

// Prospects are the requirements of a pool that [Open] has not made yet. They say what Open would do, and whether it
// would fail, and make nothing but trial files without names.
func Prospects(c Config) []health.Requirement {
	dir, err := filepath.Abs(c.Dir)
	if err != nil {
		dir = c.Dir
	}
	if c.LoopbackSize > 0 && !hasImages(dir) {
		return []health.Requirement{
			{Name: "pool", Look: look(health.PoolUnusable, func() error { return checkLoopback(dir, c.LoopbackSize) }), Good: func() string {
				return fmt.Sprintf("there is none yet: the plugin makes an xfs of %s in %s", size.Format(c.LoopbackSize), filepath.Join(dir, loopbackImage))
			}},
			{Name: "loop-devices", Look: look(health.LoopUnavailable, func() error { return tryPlain(dir) }), Good: describeLoops, Seldom: true, Code: health.LoopUnavailable},
			{Name: "layers", Look: func() []health.Condition { return checkBelow(dir, c.LoopbackSize) }, Good: func() string { return describeBelow(dir) }},
		}
	}
	return []health.Requirement{
		{Name: "pool", Look: look(health.PoolUnusable, func() error { return checkDir(dir) }), Good: func() string {
			return fmt.Sprintf("there is none yet: the plugin makes one in %s", dir)
		}},
		{Name: "reflink", Look: look(health.PoolUnusable, func() error {
			at, err := existing(dir)
			if err != nil || gate(dir) != nil {
				return nil // said of the pool
			}
			return tryReflink(at)
		}), Good: func() string {
			if gate(dir) != nil {
				return ""
			}
			return "files there can share extents"
		}, Seldom: true, Code: health.PoolUnusable},
		{Name: "loop-devices", Look: look(health.LoopUnavailable, func() error { return tryPlain(dir) }), Good: describeLoops, Seldom: true, Code: health.LoopUnavailable},
	}
}

func look(code string, check func() error) func() []health.Condition {
	return func() []health.Condition { return unusable(code, check()) }
}

// checkDir is what Open checks of a directory before it makes anything.
func checkDir(dir string) error {
	if err := gate(dir); err != nil {
		return err
	}
	return checkMade(dir)
}

// checkMade checks the directory if there is one.
func checkMade(dir string) error {
	err := checkOwner(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

// checkLoopback is what Open checks before it makes a loopback pool.
func checkLoopback(dir string, bytes int64) error {
	at, err := existing(dir)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrUnusable, err)
	}
	for _, check := range []func() error{
		func() error { return checkLocal(at) },
		func() error { return checkMade(dir) },
		func() error { return checkLoopbackSize(bytes) },
		func() error { _, err := findMkfs(); return err },
	} {
		if err := check(); err != nil {
			return err
		}
	}
	return nil
}

// tryPlain attaches a file that shares nothing. The filesystem need not share extents: it is to hold a loopback pool.
func tryPlain(dir string) error {
	at, err := existing(dir)
	if err != nil {
		return nil
	}
	f, err := plainVolume(at)
	if err == nil {
		defer f.Close()
		err = judgeTrial(at, f, useTrial(f))
	}
	if errors.Is(Full(err), ErrFull) {
		return nil
	}
	return err
}

// checkBelow compares the size of a loopback pool that is to be made with what there is.
func checkBelow(dir string, bytes int64) []health.Condition {
	at, err := existing(dir)
	if err != nil {
		return nil
	}
	st, err := fsctl.StatusAt(at)
	if err != nil || st.Available >= bytes {
		return nil
	}
	return []health.Condition{{
		Code: health.PoolLimited, Severity: health.Limited, StillReady: true,
		Text:   fmt.Sprintf("the %s of %s has %s free, and the pool is to have %s", st.Type.Name(), at, size.Format(st.Available), size.Format(bytes)),
		Cost:   "the pool has less room than its size says",
		Remedy: "make room there, or make the pool smaller",
	}}
}

func describeBelow(dir string) string {
	at, err := existing(dir)
	if err != nil {
		return ""
	}
	st, err := fsctl.StatusAt(at)
	if err != nil {
		return ""
	}
	return fmt.Sprintf("the %s of %s has %s of %s free", st.Type.Name(), at, size.Format(st.Available), size.Format(st.Total))
}
