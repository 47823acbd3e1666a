// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"
)

// smallFiles is how many files the repository has. It is in the names of the series.
const smallFiles = 5000

// files measures a checkout and a build in new volumes: small files, which nobody syncs.
func files(ctx context.Context, b *bench, d *bed) error {
	repo := filepath.Join(b.dir, "repository")
	if err := makeRepository(ctx, repo); err != nil {
		return err
	}
	for _, fs := range []string{"ext4", "xfs"} {
		for range b.rounds(5, 1, 7*time.Second) {
			for _, name := range b.shuffled(contentWays) {
				k := key{Case: "files", Pool: d.kind.name, FS: fs, Way: name}
				if err := b.filesOf(ctx, d, k, repo); err != nil {
					return fmt.Errorf("%s of %s: %w", name, fs, err)
				}
			}
		}
	}
	return os.RemoveAll(repo)
}

func (b *bench) filesOf(ctx context.Context, d *bed, k key, repo string) error {
	all, err := b.openAll(ctx, d, k, k.Way)
	if err != nil {
		return err
	}
	tree, objects := filepath.Join(all[0].v.target, "tree"), filepath.Join(all[0].v.target, "objects")
	began := time.Now()
	if _, err := run(ctx, git("clone", "--quiet", "--shared", "--template=", repo, tree)...); err != nil {
		return err
	}
	k.What = "checkout of 5000 files"
	b.add(k, time.Since(began).Seconds())
	began = time.Now()
	if err := compile(tree, objects); err != nil {
		return err
	}
	k.What = "build of 5000 objects"
	b.add(k, time.Since(began).Seconds())
	return errors.Join(b.closeAll(ctx, d, all), syncFS(d.root))
}

// git is a command of git without the settings of the user and the machine.
func git(args ...string) []string {
	return append([]string{"env", "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_NOSYSTEM=1", "git"}, args...)
}

// makeRepository makes a bare repository with one commit, all of it in one pack.
func makeRepository(ctx context.Context, repo string) error {
	if _, err := exec.LookPath("git"); err != nil {
		return fmt.Errorf("%w: %w", errMissing, err)
	}
	if _, err := run(ctx, git("init", "--quiet", "--bare", "--initial-branch=main", repo)...); err != nil {
		return err
	}
	var commit bytes.Buffer
	writeCommit(&commit)
	line := git("-C", repo, "fast-import", "--quiet")
	cmd := exec.CommandContext(ctx, line[0], line[1:]...)
	cmd.Stdin = &commit
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("git fast-import: %w\n%s", err, out)
	}
	return nil
}

// writeCommit writes the commit as git-fast-import(1) reads it: files of 1 to 12 KiB, 50 in a directory.
func writeCommit(w *bytes.Buffer) {
	fmt.Fprint(w, "commit refs/heads/main\ncommitter bench <bench> 0 +0000\ndata 0\n")
	for i := range smallFiles {
		line := fmt.Sprintf("line of file %d, which is like the lines of all others\n", i)
		content := bytes.Repeat([]byte(line), (1+i%12)<<10/len(line))
		fmt.Fprintf(w, "M 100644 inline directory%d/file%d.c\ndata %d\n%s\n", i/50, i, len(content), content)
	}
}

// compile reads each file of the tree, and writes an object of its size, as a compiler does.
func compile(tree, objects string) error {
	for i := range smallFiles {
		dir := fmt.Sprintf("directory%d", i/50)
		if i%50 == 0 {
			if err := os.MkdirAll(filepath.Join(objects, dir), 0o755); err != nil {
				return err
			}
		}
		content, err := os.ReadFile(filepath.Join(tree, dir, fmt.Sprintf("file%d.c", i)))
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(objects, dir, fmt.Sprintf("file%d.o", i)), content, 0o644); err != nil {
			return err
		}
	}
	return nil
}
