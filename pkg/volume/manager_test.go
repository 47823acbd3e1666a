// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
)

// TestLocks checks that one operation at a time works on a volume, and that operations on
// others do not wait for it.
func TestLocks(t *testing.T) {
	var busy locks
	done, err := busy.volume("a")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := busy.volume("a"); !errors.Is(err, errdefs.ErrBusy) || !strings.Contains(err.Error(), "volume a: another") {
		t.Errorf("a second operation on a volume: %v", err)
	}
	other, err := busy.volume("b")
	if err != nil {
		t.Errorf("an operation on another volume: %v", err)
	}
	other()
	done()
	snapshot, err := busy.snapshot("a")
	if err != nil {
		t.Errorf("an operation on a snapshot of that name: %v", err)
	}
	snapshot()
	if done, err = busy.volume("a"); err != nil {
		t.Errorf("after the first ended: %v", err)
	}
	done()
	if len(busy.held) != 0 {
		t.Errorf("still locked: %v", busy.held)
	}

	var inside, begun atomic.Int32
	var wg sync.WaitGroup
	for range 32 {
		wg.Go(func() {
			done, err := busy.volume("c")
			if err != nil {
				return
			}
			begun.Add(1)
			if inside.Add(1) != 1 {
				t.Error("two operations at once")
			}
			inside.Add(-1)
			done()
		})
	}
	wg.Wait()
	if begun.Load() == 0 {
		t.Error("no operation began")
	}
}
