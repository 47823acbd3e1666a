// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package golden

import (
	"fmt"
	"strings"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

var long = strings.Repeat("n", 63) // the longest label

// TestNames reads what names and generations are written as.
func TestNames(t *testing.T) {
	for text, want := range map[string]Generation{
		"ci/go":                  {Name{"ci", "go"}, 0},
		"go":                     {Name{"", "go"}, 0},
		"ci/go@1":                {Name{"ci", "go"}, 1},
		"go@42":                  {Name{"", "go"}, 42},
		long + "/" + long + "@7": {Name{long, long}, 7},
		"0/0":                    {Name{"0", "0"}, 0},
	} {
		got, err := ParseGeneration(text)
		if err != nil || got != want {
			t.Errorf("%s is %+v: %v", text, got, err)
		}
		written := got.String()
		if got.Number == 0 {
			written = got.Name.String()
		}
		if written != text {
			t.Errorf("%s is written %s", text, written)
		}
		if want.Shared() != !strings.Contains(text, "/") {
			t.Errorf("%s: shared is %v", text, want.Shared())
		}
	}
}

// TestBadNames checks what is said of names that are none.
func TestBadNames(t *testing.T) {
	for _, text := range []string{
		"", "/", "ci/", "/go", "ci/go/more", "_/go", "Go", "ci/g_o", "ci/go.1", "-go", "go-", "ci/go\n", "\x00", "ci/..",
		long + "n", long + "n/go", "*", "ci/*", "ci go", "ci\\go", "gö",
	} {
		_, err := ParseName(text)
		mustFail(t, err, fmt.Sprintf("golden %q: must be NAMESPACE/NAME, or NAME for a shared one; each has "+
			"1 to 63 lower-case letters, digits and '-', not at either end", text))
	}
	for _, number := range []string{"", "0", "-1", "+1", "01", "1 ", "x", "1@2", "9223372036854775808", "0x1", "1_0"} {
		_, err := ParseGeneration("ci/go@" + number)
		mustFail(t, err, fmt.Sprintf("golden %q: behind the @ must be the number of a generation", "ci/go@"+number))
	}
	_, err := ParseGeneration("@1")
	mustFail(t, err, `golden "": must be NAMESPACE/NAME, or NAME for a shared one; each has `+wantLabel)
}

// TestFileNames reads the names of files. What is not written so is none of ours, whatever it may mean.
func TestFileNames(t *testing.T) {
	for file, want := range map[string]Generation{
		"ci.go.1":                         {Name{"ci", "go"}, 1},
		"_.go.12":                         {Name{"", "go"}, 12},
		"shared.go.1":                     {Name{"shared", "go"}, 1},
		long + "." + long + ".2147483647": {Name{long, long}, 2147483647},
	} {
		got, ok := ofFile(file)
		if !ok || got != want || want.file() != file || len(file) > 255 {
			t.Errorf("%s is %+v, %v, and written %s", file, got, ok, want.file())
		}
	}
	for _, file := range []string{
		"", ".", "..", "ci.go", "ci.go.", "ci.go.0", "ci.go.-1", "ci.go.+1", "ci.go.01", "ci.go.1.2", "ci.go.x", "ci..1", ".go.1",
		"_._.1", "__.go.1", "Ci.go.1", "ci.Go.1", "ci.go.1\n", "ci\n.go.1", "ci/go.x.1", "ci.go.9223372036854775808", ".ci.go.1.new",
		long + "n.go.1",
	} {
		if got, ok := ofFile(file); ok {
			t.Errorf("%q is %+v", file, got)
		}
	}
}

// TestFilesOfHostileNamespaces: no two goldens share a file.
func TestFilesOfHostileNamespaces(t *testing.T) {
	files := map[string]Generation{}
	parts := []string{"", "a", "a-b", "b", "shared", "1", "1-1", "0", long}
	for _, namespace := range parts {
		for _, name := range parts[1:] {
			for _, number := range []int{1, 11} {
				g := Generation{Name{namespace, name}, number}
				if other, ok := files[g.file()]; ok {
					t.Errorf("%s is the file of %s and %s", g.file(), g, other)
				}
				files[g.file()] = g
				if got, ok := ofFile(g.file()); !ok || got != g {
					t.Errorf("%s is the file of %s, and read as %s", g.file(), g, got)
				}
			}
		}
	}
}

const field = "volume attribute"

// TestSources reads what a volume can start from.
func TestSources(t *testing.T) {
	for _, test := range []struct{ from, orElse, want string }{
		{"", "", ""},
		{"golden/go", "", "ci/go"},
		{"shared/go", "", "go"},
		{"golden/go", "shared/go", "ci/go go"},
		{"golden/shared", "golden/golden,shared/ci,content/go", "ci/shared ci/golden ci content:go"},
		{"golden/a", "golden/b,golden/c,golden/d,golden/e,golden/f,golden/g,golden/h", "ci/a ci/b ci/c ci/d ci/e ci/f ci/g ci/h"},
	} {
		sources, err := Sources(image.Lineage{From: test.from, OrElse: test.orElse}, field)
		if err != nil {
			t.Error(err)
		}
		var got []string
		for _, s := range sources {
			if s.Kind == Content {
				got = append(got, "content:"+s.Name)
			} else {
				got = append(got, s.Golden("ci").String())
			}
		}
		if text := strings.Join(got, " "); text != test.want {
			t.Errorf("from %q, orElse %q: %s, want %s", test.from, test.orElse, text, test.want)
		}
	}
}

// TestBadSources checks what is said of sources that are none.
func TestBadSources(t *testing.T) {
	const (
		badFrom   = "volume attribute from %q: must be golden/NAME or shared/NAME; a name has " + wantLabel
		badOrElse = "volume attribute orElse %q: must be golden/NAME, shared/NAME or content/NAME, " +
			"or several of them with commas between; a name has " + wantLabel
		last = "volume attribute orElse %q: nothing is tried after a content, which is always there; put it last"
	)
	for _, from := range []string{
		"go", "content/go", "golden/", "/go", "Golden/go", "golden/a/b", "golden/a@1", "golden/../x", "golden/a,shared/b", " golden/a", "shared",
		"golden/" + long + "n",
	} {
		_, err := Sources(image.Lineage{From: from, OrElse: "content/x"}, field)
		mustFail(t, err, fmt.Sprintf(badFrom, from))
	}
	for orElse, which := range map[string]string{
		"go": "go", "content/": "content/", ",": "", "shared/a,": "", "shared/a, golden/b": " golden/b", "content/a/b": "content/a/b",
		"shared/a,empty": "empty",
	} {
		_, err := Sources(image.Lineage{From: "golden/go", OrElse: orElse}, field)
		mustFail(t, err, fmt.Sprintf(badOrElse, which))
	}
	_, err := Sources(image.Lineage{From: "golden/go", OrElse: strings.Repeat("ö", 100)}, field)
	mustFail(t, err, fmt.Sprintf(badOrElse, strings.Repeat("ö", 80)))
	for _, orElse := range []string{"content/a,shared/b", "content/a,content/b"} {
		_, err := Sources(image.Lineage{From: "golden/go", OrElse: orElse}, field)
		mustFail(t, err, fmt.Sprintf(last, orElse))
	}
	many := strings.TrimSuffix(strings.Repeat("golden/a,", 8), ",")
	_, err = Sources(image.Lineage{From: "golden/go", OrElse: many}, field)
	mustFail(t, err, fmt.Sprintf("volume attribute orElse %.64q: at most 7 sources are tried; list fewer", many))
	_, err = Sources(image.Lineage{OrElse: "content/x"}, field)
	mustFail(t, err, `volume attribute orElse "content/x": is for volumes with from; set that too, or leave orElse out`)
}

// TestTarget reads what a volume becomes.
func TestTarget(t *testing.T) {
	for _, test := range []struct {
		to   string
		when image.CommitWhen
		want Source
	}{
		{"", "", Source{}},
		{"go", "", Source{Own, "go"}},
		{"shared", "always", Source{Own, "shared"}},
		{"shared/go", "marked", Source{Shared, "go"}},
		{"shared/" + long, "always", Source{Shared, long}},
	} {
		got, err := Target(image.Lineage{CommitTo: test.to, CommitWhen: test.when}, field)
		if err != nil || got != test.want {
			t.Errorf("%q, %q: %+v, %v", test.to, test.when, got, err)
		}
	}
	for _, to := range []string{"golden/go", "content/go", "shared/", "/", "a/b", "shared/a/b", "Go", "go@1", "shared/go@1", "a,b", "..", long + "n"} {
		_, err := Target(image.Lineage{CommitTo: to}, field)
		mustFail(t, err, fmt.Sprintf("volume attribute commitTo %q: must be NAME, or shared/NAME for a golden that the operator shares; "+
			"a name has "+wantLabel, to))
	}
	for _, to := range []string{"", "go"} {
		_, err := Target(image.Lineage{CommitTo: to, CommitWhen: "Always"}, field)
		mustFail(t, err, `volume attribute commitWhen "Always": must be one of marked, always`)
	}
	_, err := Target(image.Lineage{CommitWhen: "always"}, field)
	mustFail(t, err, `volume attribute commitWhen "always": is for volumes with commitTo; set that too, or leave commitWhen out`)
}
