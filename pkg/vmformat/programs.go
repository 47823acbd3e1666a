// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package vmformat

import (
	"bytes"
	"debug/elf"
	"errors"
	"os"
	"path/filepath"
	"strings"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/cage"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/vmformat/guest"
)

// toolDirs are searched after PATH.
var toolDirs = cage.ProgramDirs

// findTool returns the path of a program, or [ErrUnavailable].
func findTool(name, pkg string) (string, error) {
	p, err := cage.FindProgram(name, pkg, toolDirs)
	if err != nil {
		remedy := "install the package " + pkg
		return "", missing(remedy, "%s", strings.TrimSuffix(err.Error(), "; "+remedy))
	}
	return p, nil
}

// programFiles returns the loader and the libraries that an ELF program needs: the path in
// the initramfs → the file of this machine. A static program needs none. programFiles reads
// the ELF headers as ld.so(8) would, and executes nothing.
func programFiles(program string) (map[string]string, error) {
	files := map[string]string{}
	queue := []string{program}
	for len(queue) > 0 {
		p := queue[0]
		queue = queue[1:]
		interp, needed, runpath, err := dynamic(p)
		if err != nil {
			return nil, missing("reinstall its package", "%s: reading its ELF headers: %w", p, err)
		}
		if interp != "" {
			files[interp] = interp
		}
		for _, lib := range needed {
			at := guest.LibDir + "/" + lib
			if _, have := files[at]; have {
				continue
			}
			from, err := findLibrary(lib, runpath, p)
			if err != nil {
				return nil, err
			}
			files[at] = from
			queue = append(queue, from)
		}
	}
	return files, nil
}

// dynamic reads from a program what the dynamic loader would read: the loader's own path,
// the names of the libraries, and the directories to search first.
func dynamic(program string) (interp string, needed, runpath []string, err error) {
	f, err := elf.Open(program)
	if err != nil {
		return "", nil, nil, err
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			b := make([]byte, p.Filesz)
			if _, err := p.ReadAt(b, 0); err != nil {
				return "", nil, nil, err
			}
			interp = string(bytes.TrimRight(b, "\x00"))
		}
	}
	needed, err = f.ImportedLibraries()
	if err != nil && !errors.Is(err, elf.ErrNoSymbols) {
		return "", nil, nil, err
	}
	for _, tag := range []elf.DynTag{elf.DT_RPATH, elf.DT_RUNPATH} {
		paths, err := f.DynString(tag)
		if err != nil {
			continue
		}
		for _, p := range paths {
			p = strings.ReplaceAll(p, "$ORIGIN", filepath.Dir(program))
			runpath = append(runpath, filepath.SplitList(p)...)
		}
	}
	return interp, needed, runpath, nil
}

// findLibrary searches the program's own run path, then the system's.
func findLibrary(name string, runpath []string, needer string) (string, error) {
	dirs := append(runpath, systemLibraryDirs()...)
	for _, dir := range dirs {
		p, err := filepath.EvalSymlinks(filepath.Join(dir, name))
		if err == nil {
			return p, nil
		}
	}
	return "", missing("reinstall the package of "+needer,
		"%s needs the library %s, which is in none of %s", needer, name, strings.Join(dirs, ":"))
}

// systemLibraryDirs returns the directories of ld.so.conf(5) and those built into the loader.
func systemLibraryDirs() []string {
	var dirs []string
	confs, _ := filepath.Glob("/etc/ld.so.conf.d/*.conf")
	for _, conf := range confs {
		b, err := os.ReadFile(conf)
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(b)) {
			if line = strings.TrimSpace(line); strings.HasPrefix(line, "/") {
				dirs = append(dirs, line)
			}
		}
	}
	multiarch, _ := filepath.Glob("/lib/*-linux-gnu")
	usrMultiarch, _ := filepath.Glob("/usr/lib/*-linux-gnu")
	dirs = append(dirs, multiarch...)
	dirs = append(dirs, usrMultiarch...)
	return append(dirs, "/lib64", "/usr/lib64", "/lib", "/usr/lib")
}
