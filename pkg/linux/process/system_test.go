// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package process

import (
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
)

// TestHoldingNamedOfStrangers: neither another user's process nor another user's file counts.
func TestHoldingNamedOfStrangers(t *testing.T) {
	testenv.Root(t)
	const stranger = 65534
	for _, c := range []struct {
		name          string
		file, process int
		found         bool
	}{
		{name: "root's", found: true},
		{name: "another's file", file: stranger},
		{name: "another's process", process: stranger},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := testenv.Dir(t)
			f, err := os.Create(filepath.Join(dir, "held.lock"))
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if err := f.Chown(c.file, c.file); err != nil {
				t.Fatal(err)
			}
			cmd := exec.Command("sleep", "60")
			cmd.Stdin = f
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(c.process), Gid: uint32(c.process)}}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			defer cmd.Wait()
			defer cmd.Process.Kill()
			found, err := HoldingNamed("/" + filepath.Base(dir) + "/held.lock")
			if err != nil || (len(found) == 1) != c.found {
				t.Errorf("found %v: %v", found, err)
			}
		})
	}
}
