// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package cage

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
)

// ErrNoProgram means that a program is not installed on this machine.
var ErrNoProgram = errors.New("program not found")

// ProgramDirs lists directories to search after PATH. Filesystem tools are in sbin, which
// an ordinary user's PATH lacks.
var ProgramDirs = []string{"/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/local/bin", "/usr/bin", "/bin"}

// FindProgram looks for a program on PATH and then in further directories. It returns the
// first regular, non-empty file of that name, with symbolic links resolved. The error is
// [ErrNoProgram] and names the Debian package to install.
func FindProgram(name, debianPackage string, further []string) (string, error) {
	dirs := append(filepath.SplitList(os.Getenv("PATH")), further...)
	for _, dir := range dirs {
		p, err := filepath.EvalSymlinks(filepath.Join(dir, name))
		if err != nil {
			continue
		}
		if fi, err := os.Stat(p); err == nil && fi.Mode().IsRegular() && fi.Size() > 0 {
			return p, nil
		}
	}
	return "", fmt.Errorf("%w: %s is in none of %s; install the package %s", ErrNoProgram, name, strings.Join(dirs, ":"), debianPackage)
}

// System describes a cage that has the machine's programs and libraries, and nothing else.
func System() Spec {
	s := Spec{Binds: map[string]string{"/usr": "/usr"}, Symlinks: map[string]string{}, Files: map[string]io.ReadCloser{}}
	for _, dir := range []string{"/lib", "/lib64", "/lib32", "/bin", "/sbin", "/etc/ld.so.cache"} {
		if target, err := os.Readlink(dir); err == nil {
			s.Symlinks[dir] = target
		} else if _, err := os.Stat(dir); err == nil {
			s.Binds[dir] = dir
		}
	}
	return s
}
