// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package flock

import (
	"fmt"
	"slices"
	"testing"
)

// FuzzHolders reads /proc/locks with one line of ours among any other lines.
func FuzzHolders(f *testing.F) {
	f.Add("1: POSIX  ADVISORY  WRITE 99 08:01:5678 0 EOF", 1234, uint64(5678), false)
	f.Add("1: -> FLOCK  ADVISORY  WRITE 1235 08:01:5678 0 EOF\n2: FLOCK  ADVISORY  READ  7 00:2a:5678 0 EOF", -1, uint64(678), true)
	f.Fuzz(func(t *testing.T, text string, pid int, inode uint64, waiting bool) {
		arrow := ""
		if waiting {
			arrow = "-> "
		}
		line := fmt.Sprintf("\n7: %sFLOCK  ADVISORY  WRITE %d fd:00:%d 0 EOF\n", arrow, pid, inode)
		// Not to be found: another kind of lock, and the lock of another file.
		line += fmt.Sprintf("8: POSIX  ADVISORY  WRITE 8 fd:00:%d 0 EOF\n9: FLOCK  ADVISORY  WRITE 9 fd:00:1%[1]d 0 EOF\n", inode)
		before := flockHolders(text, inode)
		want := before
		if pid > 0 && !waiting {
			want = append(slices.Clone(before), pid)
		}
		if got := flockHolders(text+line, inode); !slices.Equal(got, want) {
			t.Errorf("got the holders %v, want %v", got, want)
		}
		if got := flockHolders(line+text, inode); len(got) != len(want) || slices.ContainsFunc(got, func(pid int) bool { return pid <= 0 }) {
			t.Errorf("got the holders %v, want %v in any order", got, want)
		}
	})
}
