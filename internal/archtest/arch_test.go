// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package archtest checks the imports against the house's plan: they run one way
// down, and each outside library stays in the rooms that need it.
package archtest

import (
	"fmt"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/csi-disktemplate/csi-disktemplate/"

// rooms lists what each room may import of the project, itself aside. A name
// that ends in "/" stands for all packages below it. Every room has internal/failpoint.
var rooms = map[string][]string{
	"cmd/csi-disktemplate/": {"pkg/"},
	"pkg/admin/":            {"pkg/health", "pkg/size"},
	"pkg/driver/":           {"pkg/admin", "pkg/volume", "pkg/template", "pkg/diskfs", "pkg/pool", "pkg/health", "pkg/meant", "pkg/size", "pkg/logs"},
	"pkg/volume/":           {"pkg/template", "pkg/diskfs", "pkg/pool", "pkg/linux/", "pkg/health", "pkg/size", "pkg/logs"},
	"pkg/volume/sweep/":     {"pkg/volume/device", "pkg/volume/golden", "pkg/volume/quota", "pkg/volume/space", "pkg/volume/place", "pkg/volume/image", "pkg/volume/errdefs", "pkg/pool", "pkg/linux/"},
	"pkg/volume/device/":    {"pkg/volume/place", "pkg/volume/image", "pkg/pool", "pkg/linux/", "pkg/logs"},
	"pkg/volume/quota/":     {"pkg/volume/image", "pkg/volume/errdefs", "pkg/diskfs", "pkg/pool", "pkg/size"},
	"pkg/volume/space/":     {"pkg/volume/image", "pkg/volume/errdefs", "pkg/diskfs", "pkg/pool", "pkg/linux/openat", "pkg/health", "pkg/size", "pkg/logs"},
	"pkg/volume/place/":     {"pkg/volume/image", "pkg/volume/errdefs", "pkg/linux/", "pkg/health", "pkg/logs"},
	"pkg/volume/image/":     {"pkg/volume/errdefs", "pkg/diskfs", "pkg/pool", "pkg/linux/", "pkg/size", "pkg/logs"},
	"pkg/volume/warm/":      {"pkg/diskfs", "pkg/linux/", "pkg/logs"},
	"pkg/volume/golden/":    {"pkg/volume/image", "pkg/volume/errdefs", "pkg/diskfs", "pkg/pool", "pkg/linux/", "pkg/health", "pkg/meant", "pkg/size", "pkg/watchedlist"},
	"pkg/volume/errdefs/":   {},
	"pkg/template/":         {"pkg/diskfs", "pkg/pool", "pkg/linux/", "pkg/size", "pkg/logs"},
	"pkg/disktest/":         {"pkg/disks", "pkg/vmformat", "pkg/template", "pkg/diskfs", "pkg/pool", "pkg/linux/"},
	"pkg/disks/":            {"pkg/template", "pkg/vmformat", "pkg/diskfs", "pkg/pool", "pkg/linux/", "pkg/size"},
	"pkg/prewarm/":          {"pkg/template", "pkg/diskfs", "pkg/pool", "pkg/health", "pkg/size", "pkg/logs", "pkg/watchedfile"},
	"pkg/content/":          {"pkg/pool", "pkg/linux/", "pkg/health", "pkg/size", "pkg/logs", "pkg/watchedfile", "pkg/watchedlist"},
	"pkg/watchedlist/":      {"pkg/watchedfile", "pkg/health"},
	"pkg/watchedfile/":      {"pkg/size"},
	"pkg/pool/":             {"pkg/linux/", "pkg/health", "pkg/size", "pkg/logs"},
	"pkg/vmformat/":         {"pkg/diskfs", "pkg/linux/", "pkg/health", "pkg/size"},
	"pkg/growfs/":           {"pkg/diskfs", "pkg/linux/"},
	"pkg/diskfs/":           {"pkg/size"},
	"pkg/health/":           {},
	"pkg/kubectl/":          {},
	"pkg/logs/":             {},
	"pkg/meant/":            {},
	"pkg/size/":             {},
	"pkg/linux/":            {},
	"hack/":                 {"pkg/", "internal/harness"},
	"internal/":             {},
}

// outside lists the only rooms that may import a library.
var outside = map[string][]string{
	"golang.org/x/sys/unix":                        {"pkg/linux/", "pkg/vmformat/guest/", "hack/", "internal/loops/"},
	"github.com/container-storage-interface/spec/": {"pkg/driver/", "internal/harness/", "hack/demo/", "hack/bench/"},
	"github.com/google/go-containerregistry/":      {"pkg/content/registry/"},
	"google.golang.org/grpc":                       {"pkg/driver/", "internal/harness/"},
	"github.com/prometheus/":                       {"pkg/driver/", "cmd/csi-disktemplate/"},
	"os/exec":                                      {"pkg/vmformat/", "pkg/growfs/", "pkg/content/disk/", "pkg/linux/cage/", "pkg/pool/", "pkg/kubectl/", "hack/", "internal/"},
	module + "internal/testenv":                    {"internal/harness/harnesstest/"},
	module + "internal/harness/harnesstest":        {},
}

func TestImports(t *testing.T) {
	root := "../.."
	seen := 0
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (strings.HasPrefix(d.Name(), ".") && path != root || d.Name() == "bin") {
			return fs.SkipDir
		}
		// Tests may look into every room.
		if filepath.Ext(path) != ".go" || strings.HasSuffix(path, "_test.go") {
			return nil
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		seen++
		for _, spec := range file.Imports {
			name, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				return err
			}
			for _, wrong := range check(filepath.ToSlash(rel), name) {
				t.Error(wrong)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if seen < 50 {
		t.Errorf("only %d files were found", seen)
	}
}

// check returns what is wrong with an import.
func check(file, imported string) (wrong []string) {
	room := roomOf(file)
	if room == "" {
		return []string{file + " is in no room: add it to the plan"}
	}
	if name, ours := strings.CutPrefix(imported, module); ours && name != "internal/failpoint" {
		if !strings.HasPrefix(name+"/", room) && !slices.ContainsFunc(rooms[room], func(r string) bool { return covers(r, name) }) {
			wrong = append(wrong, fmt.Sprintf("%s imports %s: %s may import only %v", file, name, room, rooms[room]))
		}
	}
	for library, where := range outside {
		if covers(library, imported) && !slices.ContainsFunc(where, func(w string) bool { return strings.HasPrefix(file, w) }) {
			wrong = append(wrong, fmt.Sprintf("%s imports %s, which belongs to %v alone", file, imported, where))
		}
	}
	return wrong
}

// roomOf returns the innermost room of a file, or "".
func roomOf(file string) (innermost string) {
	for room := range rooms {
		if strings.HasPrefix(file, room) && len(room) > len(innermost) {
			innermost = room
		}
	}
	return innermost
}

// covers reports whether an import is the one named, or below it.
func covers(rule, imported string) bool {
	return imported == strings.TrimSuffix(rule, "/") || strings.HasPrefix(imported, strings.TrimSuffix(rule, "/")+"/")
}

// TestTheCheckItself: a rule that allows everything would check nothing.
func TestTheCheckItself(t *testing.T) {
	for file, imported := range map[string]string{
		"pkg/volume/x.go":       module + "pkg/driver",
		"pkg/volume/image/x.go": module + "pkg/volume",
		"pkg/volume/place/x.go": module + "pkg/volume/sweep",
		"pkg/template/x.go":     module + "pkg/vmformat",
		"pkg/driver/x.go":       module + "pkg/linux/loopdev",
		"pkg/diskfs/x.go":       "golang.org/x/sys/unix",
		"pkg/volume/y.go":       "os/exec",
		"elsewhere/x.go":        "fmt",
	} {
		if len(check(file, imported)) == 0 {
			t.Errorf("%s may import %s", file, imported)
		}
	}
}
