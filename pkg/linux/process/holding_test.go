// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package process

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
)

// TestHoldingNamed finds a process by a file that it has open, by its name and by its inode, and reads how the
// process was started.
func TestHoldingNamed(t *testing.T) {
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "held.lock")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	end := "/" + filepath.Base(dir) + "/held.lock"
	if found, err := HoldingNamed(end); err != nil || len(found) != 0 { // this process does not count
		t.Errorf("%v %v", found, err)
	}
	cmd := exec.Command("sleep", "60")
	cmd.Stdin, cmd.Env = f, []string{"A=1", "B=two words"}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	pid := cmd.Process.Pid
	fi, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	if found, err := Holding(fi); err != nil || len(found) != 2 || len(found[pid]) != 1 || len(found[os.Getpid()]) != 1 {
		t.Errorf("%v %v", found, err)
	}
	if found, err := HoldingNamed(end); err != nil || !slices.Equal(found, []Process{{pid, path}}) {
		t.Errorf("%v %v", found, err)
	}
	if args := Arguments(pid); !slices.Equal(args, []string{"sleep", "60"}) {
		t.Errorf("its arguments are %q", args)
	}
	if a, b, c := Variable(pid, "A"), Variable(pid, "B"), Variable(pid, "C"); a != "1" || b != "two words" || c != "" {
		t.Errorf("its variables are %q, %q and %q", a, b, c)
	}
	if args := Arguments(1 << 30); args != nil {
		t.Errorf("no process has the arguments %q", args)
	}
}
