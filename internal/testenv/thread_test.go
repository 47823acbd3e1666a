// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package testenv

import (
	"sync"
	"syscall"
	"testing"
)

// TestOnThread has more functions at once than there are idle threads, so that the main thread
// would be among those that run them. It never ends, and keeps what a function has changed.
func TestOnThread(t *testing.T) {
	const most = 64
	var all, together sync.WaitGroup
	together.Add(most)
	for range most {
		all.Go(func() {
			OnThread(func() {
				together.Done()
				together.Wait()
				if syscall.Gettid() == syscall.Getpid() {
					t.Error("a function ran on the main thread")
				}
			})
		})
	}
	all.Wait()
}
