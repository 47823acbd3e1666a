// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package golden

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/internal/plain"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/health"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
)

// shares is a file of shared goldens, and what is made of it.
type shares struct {
	*Sharing
	t    *testing.T
	path string
}

func newShares(t *testing.T, entries ...string) shares {
	t.Helper()
	s := shares{t: t, path: filepath.Join(t.TempDir(), "goldens.yaml")}
	s.write("goldens:\n" + strings.Join(entries, "\n"))
	s.Sharing = OpenSharing(s.path)
	return s
}

// write replaces the file in one step, as kubelet does.
func (s shares) write(content string) {
	s.t.Helper()
	err := os.WriteFile(s.path+".new", []byte(content), 0o600)
	if err := errors.Join(err, os.Rename(s.path+".new", s.path)); err != nil {
		s.t.Fatal(err)
	}
}

// says compares the conditions with the beginnings of their messages.
func (s shares) says(want ...string) {
	s.t.Helper()
	found := s.Conditions()
	if len(found) != len(want) {
		s.t.Errorf("%d conditions, want %d: %+v", len(found), len(want), found)
		return
	}
	for i, c := range found {
		if c.Code != health.GoldenFailed || c.Severity != health.Degraded || !c.StillReady || !strings.HasPrefix(c.Object, s.path) {
			s.t.Errorf("condition %+v", c)
		}
		if !strings.HasPrefix(c.Message(), want[i]) {
			s.t.Errorf("is told %s\nwant    %s", c.Message(), want[i])
		}
		for _, fault := range plain.Faults(c.Message()) {
			s.t.Errorf("%s: %s", fault, c.Message())
		}
	}
}

// mustFail compares an error of a request with its whole text.
func mustFail(t *testing.T, err error, want string) {
	t.Helper()
	if !errors.Is(err, errdefs.ErrInvalid) || err.Error() != "invalid request: "+want {
		t.Errorf("is told %v\nwant    invalid request: %s", err, want)
		return
	}
	for _, fault := range plain.Faults(err.Error()) {
		t.Errorf("%s: %v", fault, err)
	}
}

// TestSharing checks who may read and write what.
func TestSharing(t *testing.T) {
	s := newShares(t,
		`- {name: everybody, readers: ["*"], writers: [ci-main]}`,
		`- {name: some, readers: [ci-pr, staging], writers: [ci-main]}`,
		`- {name: writers, writers: [ci-main, ci-more]}`,
		`- {name: readers, readers: [ci-pr]}`)
	for _, may := range []struct{ namespace, read, write string }{
		{"ci-main", "everybody some writers", "everybody some writers"},
		{"ci-more", "everybody writers", "writers"},
		{"ci-pr", "everybody some readers", ""},
		{"staging", "everybody some", ""},
		{"other", "everybody", ""},
		{"", "everybody", ""},
		{"*", "everybody", ""},
	} {
		var read, write []string
		for _, name := range []string{"everybody", "some", "writers", "readers", "nothing", "", "*"} {
			if s.CheckRead(name, may.namespace) == nil {
				read = append(read, name)
			}
			if s.CheckWrite(name, may.namespace) == nil {
				write = append(write, name)
			}
		}
		if r, w := strings.Join(read, " "), strings.Join(write, " "); r != may.read || w != may.write {
			t.Errorf("namespace %q may read %q and write %q, want %q and %q", may.namespace, r, w, may.read, may.write)
		}
	}
	s.says()
}

// TestSharingRefuses compares what is said of a golden that is not listed with what is said of one that others have.
func TestSharingRefuses(t *testing.T) {
	s := newShares(t, `- {name: go, readers: ["*"], writers: [ci-main]}`, `- {name: npm, readers: [ci-pr]}`,
		`- {name: secret, writers: [secret]}`)
	const (
		noRead  = `shared golden %q does not exist, or namespace %q may not start from it; shared goldens that it may start from: %s`
		noWrite = `shared golden %q does not exist, or namespace %q may not commit to it; shared goldens that it may commit to: %s`
	)
	for _, name := range []string{"secret", "nothing"} {
		mustFail(t, s.CheckRead(name, "ci-pr"), fmt.Sprintf(noRead, name, "ci-pr", "go, npm"))
		mustFail(t, s.CheckWrite(name, "ci-pr"), fmt.Sprintf(noWrite, name, "ci-pr", "none"))
	}
	mustFail(t, s.CheckWrite("go", "ci-pr"), fmt.Sprintf(noWrite, "go", "ci-pr", "none"))
	long := strings.Repeat("n", 100)
	mustFail(t, s.CheckRead("nil\n"+long, long), fmt.Sprintf(noRead, "nil\n"+long[:60], long[:64], "go"))

	var many []string
	for i := range 23 {
		many = append(many, fmt.Sprintf(`- {name: g%02d, writers: [ci]}`, 22-i))
	}
	mustFail(t, newShares(t, many...).CheckWrite("x", "ci"), fmt.Sprintf(noWrite, "x", "ci", "g00, g01, g02, g03, g04, "+
		"g05, g06, g07, g08, g09, g10, g11, g12, g13, g14, g15, g16, g17, g18, g19 and 3 more"))
}

// TestNothingShared has no file: nothing is wrong, and nothing is shared.
func TestNothingShared(t *testing.T) {
	s := OpenSharing("")
	for _, err := range []error{s.CheckRead("go", "ci"), s.CheckWrite("go", "ci")} {
		if !errors.Is(err, errdefs.ErrInvalid) || !strings.HasSuffix(err.Error(), ": none") {
			t.Error(err)
		}
	}
	if found := s.Conditions(); found != nil {
		t.Errorf("%+v", found)
	}
}

// TestBadShares checks what is said of each entry, and that it leaves its neighbours alone.
func TestBadShares(t *testing.T) {
	for entry, says := range map[string]string{
		`- text`:                                       "entry 2: must be a map, with name, and readers or writers or both",
		`- {readers: [ci]}`:                            "entry 2: name is missing",
		`- {name: Go, readers: [ci]}`:                  `entry 2: name "Go": must be 1 to 63 lower-case letters, digits and '-', not at either end`,
		`- {name: a/b, readers: [ci]}`:                 `entry 2: name "a/b": must be 1 to 63 lower-case letters`,
		`- {name: a}`:                                  "entry 2 (a): it has neither readers nor writers; list the namespaces that may use it",
		`- {name: a, readers: []}`:                     "entry 2 (a): readers (a list): must be a list of namespaces, each 1 to 63",
		`- {name: a, readers: ci}`:                     `entry 2 (a): readers "ci": must be a list of namespaces, each 1 to 63`,
		`- {name: a, readers: [Ci]}`:                   `entry 2 (a): readers (a list): "Ci" is no namespace: must be a list`,
		`- {name: a, writers: [ci, "*"]}`:              `entry 2 (a): writers (a list): "*" would let every namespace decide what all others start from; list the namespaces that may`,
		`- {name: a, readers: ["*"], writers: }`:       `entry 2 (a): writers (empty): must be a list of namespaces`,
		`- {name: a, readers: ["*"], writer: [ci]}`:    `entry 2 (a): the field "writer" is unknown; there are name, readers, writers`,
		`- {name: good, readers: ["*"], writers: [x]}`: "entry 2 (good): another entry before it has the same name; give it one of its own",
	} {
		s := newShares(t, `- {name: good, writers: [ci]}`, entry, `- {name: better, writers: [ci]}`)
		entry, text, _ := strings.Cut(says, ": ")
		s.says(entry + " of the list of shared goldens " + s.path + " is left out: " + text)
		for _, name := range []string{"good", "better"} {
			if err := s.CheckWrite(name, "ci"); err != nil {
				t.Errorf("%s: %v", says, err)
			}
		}
		if s.CheckRead("good", "other") == nil || s.CheckRead("a", "ci") == nil {
			t.Errorf("%s: it counts all the same", says)
		}
	}
}

// TestSharesChange replaces the file. What it says counts at the next question, and what cannot be read leaves what
// was read before.
func TestSharesChange(t *testing.T) {
	s := newShares(t)
	must := func(read, write bool) {
		t.Helper()
		if (s.CheckRead("go", "pr") == nil) != read || (s.CheckWrite("go", "pr") == nil) != write {
			t.Errorf("reading is %v, writing %v", s.CheckRead("go", "pr"), s.CheckWrite("go", "pr"))
		}
	}
	must(false, false)
	s.write(`goldens: [{name: go, readers: [pr]}]`)
	must(true, false)
	s.write(`goldens: [{name: go, writers: [pr]}]`)
	must(true, true)
	s.says()
	s.write(`goldens: [`)
	must(true, true)
	s.says("the list of shared goldens " + s.path + `: it is no valid YAML; the parser says "line 1: `)
	s.write(`golden: []`)
	const remedy = ": correct it; what it listed before stays listed"
	s.says("the list of shared goldens " + s.path + `: the key "golden" is unknown: the only one is "goldens"` + remedy)
	if err := os.Remove(s.path); err != nil {
		t.Fatal(err)
	}
	must(true, true)
	s.says("the list of shared goldens cannot be read: open " + s.path + ": no such file or directory" + remedy)
	s.write(`goldens: [{name: go, readers: [pr]}, {name: go}]`)
	must(true, false)
	s.says("entry 2 (go) of the list of shared goldens ")
	s.write(`goldens: []`)
	must(false, false)
	s.says()
}

// TestSharingByMany asks from many goroutines while the file changes. Each answer is of one of the two files.
func TestSharingByMany(t *testing.T) {
	s := newShares(t, `- {name: go, readers: [ci]}`)
	done := make(chan struct{})
	var wait sync.WaitGroup
	for range 8 {
		wait.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				if err := s.CheckRead("go", "ci"); err != nil {
					t.Error(err)
				}
				if found := s.Conditions(); len(found) > 0 {
					t.Error(found)
				}
			}
		})
	}
	for i := range 50 {
		s.write(fmt.Sprintf("goldens:\n- {name: go, readers: [ci, n%d]}", i))
	}
	close(done)
	wait.Wait()
	if err := s.CheckRead("go", "n49"); err != nil {
		t.Error(err)
	}
}
