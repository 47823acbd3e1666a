// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
)

// TestTemplateCommands builds templates by the command, and lists them.
func TestTemplateCommands(t *testing.T) {
	dir, files := filepath.Join(testenv.XFS.Mount(t, 2<<30), "pool"), testenv.Dir(t)
	open(t, pool.Config{Dir: dir})
	list := filepath.Join(files, "contents.yaml")
	for name, text := range map[string][]byte{
		list:                              []byte("contents:\n- {name: files, tar: files.tar, namespaces: [shop]}\n- {name: vm, disk: vm.raw, namespaces: [shop]}\n"),
		filepath.Join(files, "files.tar"): archiveOf(t, file{"big", strings.Repeat("x", 20<<20), 0}),
		filepath.Join(files, "vm.raw"):    make([]byte, 5<<20),
	} {
		if err := os.WriteFile(name, text, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	build := func(want int, says string, flags ...string) {
		t.Helper()
		line := append([]string{"template", "build", "--pool", dir, "--accel", "tcg", "--contents", list, "--content-dir", files}, flags...)
		code, out := testenv.Product(t, line...)
		if code != want || !regexp.MustCompile(says).MatchString(out) {
			t.Errorf("%v: exit code %d: %s; want %s", flags, code, out, says)
		}
	}
	show := func(flags ...string) string {
		t.Helper()
		code, out := testenv.Product(t, append([]string{"template", "list", "--pool", dir}, flags...)...)
		if code != 0 {
			t.Errorf("exit code %d: %s", code, out)
		}
		return out
	}
	if out := show(); out != alone+"\nThere are no templates.\n" {
		t.Error(out)
	}
	build(0, `Template ext4-64m-\w+ \(ext4 64Mi content=files\) was built in `, "--content", "files", "--size", "64Mi")
	build(0, `was there\.`, "--content", "files", "--size", "64Mi")
	build(0, `Template raw-0m-\w+ \(raw content=vm\) was built in `, "--content", "vm")
	build(1, `content files has 20Mi of data \(entries: 1\), and needs \d+Mi as ext4; the volume has 16Mi: ask for a larger size`, "--content", "files", "--size", "16Mi")
	build(1, `unknown content: "other" is not listed`, "--content", "other")
	build(1, `--size "lots"`, "--content", "files", "--size", "lots")

	table := show()
	for _, line := range []string{
		`TEMPLATE +FILESYSTEM +SIZE +CONTENT +STATE +TAKES +FREES +EXTENTS +READY +LAST USED`,
		`ext4-64m-\w+ +ext4 +64Mi +files +there +2\d\.?\d*Mi +2\d\.?\d*Mi +\d+ +- +20.*Z`, `raw-0m-\w+ +raw +- +vm +there +.*`,
	} {
		if !regexp.MustCompile(`(?m)^` + line + `$`).MatchString(table) {
			t.Errorf("no line is %s:\n%s", line, table)
		}
	}
	var all struct {
		Templates []struct {
			Content string `json:"content"`
			Extents int    `json:"extents"`
		} `json:"templates"`
	}
	if err := json.Unmarshal([]byte(strings.TrimPrefix(show("-o", "json"), alone)), &all); err != nil || len(all.Templates) != 2 || all.Templates[0].Content != "files" || all.Templates[0].Extents == 0 {
		t.Errorf("%+v: %v", all, err)
	}
}
