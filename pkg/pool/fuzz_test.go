// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package pool

import (
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"
)

// FuzzKernelText reads what the kernel keeps for us: /proc/locks, where one line among
// any others is ours, and the value of an image's attribute.
func FuzzKernelText(f *testing.F) {
	f.Add("1: POSIX  ADVISORY  WRITE 99 08:01:5678 0 EOF", 1234, uint64(5678), false)
	f.Add("1: -> FLOCK  ADVISORY  WRITE 1235 08:01:5678 0 EOF\n2: FLOCK  ADVISORY  READ  7 00:2a:5678 0 EOF", -1, uint64(678), true)
	f.Add(`{"version":2,"id":"v"}`, 1, uint64(0), true)
	f.Add(`[1e400]`, 0, uint64(1), false)
	f.Add(`"`+strings.Repeat("<", 4000)+`"`, 0, uint64(1), false)
	f.Fuzz(func(t *testing.T, text string, pid int, inode uint64, waiting bool) {
		arrow := ""
		if waiting {
			arrow = "-> "
		}
		line := fmt.Sprintf("\n7: %sFLOCK  ADVISORY  WRITE %d fd:00:%d 0 EOF\n", arrow, pid, inode)
		// Neither another kind of lock nor that of another file.
		line += fmt.Sprintf("8: POSIX  ADVISORY  WRITE 8 fd:00:%d 0 EOF\n9: FLOCK  ADVISORY  WRITE 9 fd:00:1%[1]d 0 EOF\n", inode)
		before := flockHolders(text, inode)
		want := before
		if pid > 0 && !waiting {
			want = append(slices.Clone(before), pid)
		}
		if got := flockHolders(text+line, inode); !slices.Equal(got, want) {
			t.Errorf("%v hold the lock, not %v", got, want)
		}
		if got := flockHolders(line+text, inode); len(got) != len(want) || slices.ContainsFunc(got, func(pid int) bool { return pid <= 0 }) {
			t.Errorf("%v hold the lock, not %v in another order", got, want)
		}

		var v, again any
		if err := decode([]byte(text), &v); err != nil {
			if !errors.Is(err, ErrNoRecord) {
				t.Error(err)
			}
			return
		}
		b, err := encode(v)
		if err != nil { // too long: it must not be written, for it would not be read
			return
		}
		if err := decode(b, &again); err != nil || len(b) > maxRecord || !reflect.DeepEqual(v, again) {
			t.Errorf("%q is %v, then %v: %v", text, v, again, err)
		}
	})
}
