// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"testing"
)

// TestReleaseIsOne checks that everything which names a release of the image names the one in
// RELEASE, and that the Helm chart has its number.
func TestReleaseIsOne(t *testing.T) {
	want := strings.TrimSpace(release)
	if !regexp.MustCompile(`^v\d+\.\d+\.\d+$`).MatchString(want) {
		t.Errorf("RELEASE has %q", release)
	}
	image := regexp.MustCompile(`csi-disktemplate/csi-disktemplate:(\S+)`)
	named := map[string]int{}
	for _, where := range []string{"deploy", "docs", "README.md", "Containerfile", "hack"} {
		err := filepath.WalkDir(filepath.Join("../..", where), func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			b, err := os.ReadFile(path)
			for _, m := range image.FindAllSubmatch(b, -1) {
				named[path]++
				if string(m[1]) != want {
					t.Errorf("%s names %s, and RELEASE %s", path, m[0], want)
				}
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if named["../../deploy/kubernetes/base/plugin.yaml"] != 1 || named["../../Containerfile"] != 1 {
		t.Errorf("an image is named in %v", named)
	}
	chart, err := os.ReadFile("../../deploy/helm/csi-disktemplate/Chart.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{"\nversion: " + want[1:] + "\n", "\nappVersion: " + want + " "} {
		if !strings.Contains(string(chart), line) {
			t.Errorf("RELEASE has %s, and the chart lacks %q:\n%s", want, line, chart)
		}
	}
}

// TestStamp checks the version that a build gets, in checkouts with and without a release's tag.
func TestStamp(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "checkout")
	stamp := func() string {
		t.Helper()
		out, err := exec.Command(filepath.Join(dir, "hack/stamp.sh")).CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return string(out)
	}
	git := func(args ...string) string {
		t.Helper()
		cmd := exec.Command("git", append([]string{"-C", dir, "-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgSign=false"}, args...)...)
		cmd.Env = append(os.Environ(), "GIT_CONFIG_GLOBAL=/dev/null", "GIT_COMMITTER_DATE=2026-01-02T03:04:05Z")
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("git %v: %v: %s", args, err, out)
		}
		return strings.TrimSpace(string(out))
	}
	for _, file := range []string{"hack/stamp.sh", "cmd/csi-disktemplate/RELEASE"} {
		b, err := os.ReadFile(filepath.Join("../..", file))
		if err == nil {
			err = os.MkdirAll(filepath.Dir(filepath.Join(dir, file)), 0o755)
		}
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, file), b, 0o755)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("GIT_CEILING_DIRECTORIES", filepath.Dir(dir))
	if got := stamp(); got != "" {
		t.Errorf("an archive of the sources is stamped %q", got)
	}
	git("init", "-q")
	if got := stamp(); got != "" {
		t.Errorf("a repository without a commit is stamped %q", got)
	}
	commit := func() string {
		git("add", "-A")
		git("commit", "-q", "--allow-empty", "-m", "c")
		return git("rev-parse", "HEAD")
	}
	want := func(version, hash string) {
		t.Helper()
		if got, want := stamp(), fmt.Sprintf("-X main.version=%s -X main.commit=%s -X main.date=2026-01-02\n", version, hash); got != want {
			t.Errorf("stamped is %q, want %q", got, want)
		}
	}
	next := strings.TrimSpace(release)
	short := func() string { return git("rev-parse", "--short", "HEAD") }
	first := commit()
	want(next+"-dev+"+short(), first)
	git("tag", "nightly")
	want(next+"-dev+"+short(), first)
	if err := os.WriteFile(filepath.Join(dir, "hack/stamp.sh.orig"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	git("add", "-A")
	want(next+"-dev+"+short()+".dirty", first)
	second := commit()
	git("tag", "-a", "-m", "t", next)
	want(next, second)
	third := commit()
	want(next+"-1-g"+short(), third)
}

// TestVersion checks what --version prints, of a build with and without a stamp.
func TestVersion(t *testing.T) {
	run := func() string {
		var out bytes.Buffer
		cmd := newCommand()
		cmd.SetArgs([]string{"--version"})
		cmd.SetOut(&out)
		if err := cmd.Execute(); err != nil {
			t.Error(err)
		}
		return out.String()
	}
	where := runtime.Version() + ", " + runtime.GOOS + "/" + runtime.GOARCH + ")\n"
	if got, want := run(), "csi-disktemplate "+strings.TrimSpace(release)+"-dev (unknown commit, "+where; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	defer func() { version, commit, date = "", "", "" }()
	version, commit, date = "v0.1.0-12-gabc1234", "abc1234", "2026-01-02"
	if got, want := run(), "csi-disktemplate v0.1.0-12-gabc1234 (abc1234, 2026-01-02, "+where; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}
