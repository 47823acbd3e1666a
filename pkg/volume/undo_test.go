// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"context"
	"errors"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/internal/plain"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
)

// TestUndo: a user reads why the operation failed, and not that cleaning up failed too. Nor does that change the kind
// of the error.
func TestUndo(t *testing.T) {
	var order string
	var u undo
	for _, step := range []string{"a", "b", "c"} {
		u.add(func() error {
			order += step
			return errdefs.ErrNotFound
		})
	}
	err := pool.ErrFull
	u.on(&err)
	if order != "cba" || err.Error() != pool.ErrFull.Error() || errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("the steps ran in the order %s, and the error is %v", order, err)
	}
}

// TestUnderWay: the message has no word of Go's contexts, and the cause is there all the same.
func TestUnderWay(t *testing.T) {
	err := error(&underWay{"volume pvc-1", context.DeadlineExceeded})
	if !errors.Is(err, errdefs.ErrUnderWay) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v has lost its kind or its cause", err)
	}
	const want = "still under way: volume pvc-1: Kubernetes will ask again, and the work goes on meanwhile"
	if err.Error() != want || len(plain.Faults(want)) > 0 {
		t.Errorf("says %q", err)
	}
}
