// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package diskfs

import (
	"fmt"
	"os"
	"strings"
	"testing"
)

// The tables of filesystems stand between two lines of docs/filesystems.md.
const (
	filesystemsBegin = "<!-- Written by UPDATE=1 go test -run TestFilesystemsAreDocumented ./pkg/diskfs -->\n"
	filesystemsEnd   = "<!-- End of the tables of filesystems. -->\n"
)

// TestFilesystemsAreDocumented compares the tables of sizes, labels and format options with the filesystems. With
// UPDATE=1 in the environment it writes them.
func TestFilesystemsAreDocumented(t *testing.T) {
	const doc = "../../docs/filesystems.md"
	b, err := os.ReadFile(doc)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, began := strings.Cut(string(b), filesystemsBegin)
	has, after, ended := strings.Cut(rest, filesystemsEnd)
	if !began || !ended {
		t.Fatalf("%s lacks the lines around the tables of filesystems", doc)
	}
	want := boundsTable() + optionsTable()
	if os.Getenv("UPDATE") != "" {
		if err := os.WriteFile(doc, []byte(before+filesystemsBegin+want+filesystemsEnd+after), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if has != want {
		t.Errorf("%s does not have the filesystems as they are; run the line that stands in it\n%s", doc, want)
	}
}

func boundsTable() string {
	text := "\n| filesystem | smallest | largest | label |\n|---|---|---|---|\n"
	for _, fs := range formatted() {
		text += fmt.Sprintf("| %s | %d MiB | %s | %d bytes |\n", fs.Name, fs.MinSize/MiB, largest(fs.MaxSize), fs.maxLabel)
	}
	return text
}

// largest is a size as a reader knows it.
func largest(bytes int64) string {
	if bytes == MaxSize {
		return "4 PiB (2³²−1 MiB)"
	}
	return fmt.Sprintf("%d TiB", bytes>>40)
}

func optionsTable() string {
	text := "\n| filesystem | format option | values |\n|---|---|---|\n"
	for _, fs := range formatted() {
		for _, o := range fs.options {
			text += fmt.Sprintf("| %s | `%s` | %s |\n", fs.Name, o.key, strings.TrimPrefix(o.want, "one of "))
		}
	}
	return text + "\n"
}

// formatted are the filesystems that users may ask for.
func formatted() (list []*Filesystem) {
	for _, fs := range table {
		if fs.Formatted() {
			list = append(list, fs)
		}
	}
	return list
}
