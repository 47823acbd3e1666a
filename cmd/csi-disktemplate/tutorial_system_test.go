// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
)

var (
	typedBlock = regexp.MustCompile("(?s)\n```sh\n(.*?)```\n")
	traced     = regexp.MustCompile(`(?m)^\++ .*$`) // by set -x
)

// blocksOf are the commands of a document: its blocks that are marked sh.
func blocksOf(t *testing.T, doc string) (blocks []string) {
	t.Helper()
	b, err := os.ReadFile("../../docs/" + doc)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range typedBlock.FindAllStringSubmatch(string(b), -1) {
		blocks = append(blocks, m[1])
	}
	return blocks
}

// cleanCopy is the source as a clone would have it, with what is not committed yet.
func cleanCopy(t *testing.T, dir string) string {
	t.Helper()
	source := filepath.Join(dir, "csi-disktemplate")
	testenv.Run(t, "mkdir", source)
	testenv.Run(t, "bash", "-euc", "set -o pipefail; cd ../..; "+
		"git -c safe.directory='*' ls-files -z --cached --others --exclude-standard | "+
		`tar --create --null --files-from - | tar --extract --directory "$1"`, "bash", source)
	return source
}

// TestTutorial types the commands of docs/tutorial.md in a clean copy of the source. The test is root, so its sudo runs
// the command and does nothing else.
func TestTutorial(t *testing.T) {
	dir := testenv.Dir(t)
	programs, demo := filepath.Join(dir, "programs"), filepath.Join(dir, "demo")
	testenv.Run(t, "mkdir", programs)
	if err := os.WriteFile(filepath.Join(programs, "sudo"), []byte("#!/bin/sh\nexec \"$@\"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	blocks := blocksOf(t, "tutorial.md")
	cmd := exec.CommandContext(t.Context(), "bash", "-c", "set -ex\n"+strings.Join(blocks, ""))
	cmd.Dir = cleanCopy(t, dir)
	cmd.Env = append(os.Environ(), "PATH="+programs+":"+os.Getenv("PATH"),
		"MAKEFLAGS= -- DEMO_DIR="+demo) // the pool of somebody's demo stays
	code, out := testenv.Finish(t, cmd)
	if code != 0 || len(blocks) < 7 {
		t.Fatalf("exit code %d of %d blocks", code, len(blocks))
	}
	printed := traced.ReplaceAllString(out, "")
	for says, times := range map[string]int{
		"This is boot 1 from this disk.": 2, "This is boot 2 from this disk.": 1,
		`LABEL="mine"`: 1, "2 images, vm-1.img to vm-2.img": 1, "vm-2.img: UUID=": 1,
	} {
		if n := strings.Count(printed, says); n != times {
			t.Errorf("says %q %d times, want %d", says, n, times)
		}
	}
	if _, err := os.Lstat(demo); err == nil {
		t.Error("the demo's pool is left")
	}
}
