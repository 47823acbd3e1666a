// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package content

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/klauspost/compress/gzip"

	"github.com/csi-disktemplate/csi-disktemplate/internal/plain"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/content/archive"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/health"
)

// node is a directory of contents, and what reads it.
type node struct {
	testing.TB
	dir  string
	cfg  Config
	stop func()
	*Contents
}

func newNode(t testing.TB) *node {
	t.Helper()
	dir := t.TempDir()
	n := &node{TB: t, dir: dir, stop: func() {}}
	t.Cleanup(func() { n.stop() })
	n.cfg = Config{
		Path: filepath.Join(dir, "contents.yaml"), Dir: filepath.Join(dir, "files"), State: filepath.Join(dir, "digests"),
		NewFile: func() (*os.File, error) { return os.CreateTemp(dir, "prepared") },
	}
	if err := os.Mkdir(n.cfg.Dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return n
}

// list gives the file its entries, and starts anew.
func (n *node) list(entries ...string) {
	n.Helper()
	n.write(n.cfg.Path, []byte("contents:\n"+strings.Join(entries, "\n")))
	n.restart()
}

// restart ends what runs, as the end of a process does, and starts anew.
func (n *node) restart() {
	n.stop()
	ctx, cancel := context.WithCancel(context.WithoutCancel(n.Context()))
	c := New(ctx, n.cfg)
	n.Contents, n.stop = c, func() { cancel(); c.answers.tries.Wait() }
}

// put makes a file of the directory of contents, under a name that it gets in one step.
func (n *node) put(name string, content []byte) {
	n.Helper()
	n.write(filepath.Join(n.dir, "new"), content)
	if err := os.Rename(filepath.Join(n.dir, "new"), filepath.Join(n.cfg.Dir, name)); err != nil {
		n.Fatal(err)
	}
}

func (n *node) write(path string, content []byte) {
	n.Helper()
	if err := os.WriteFile(path, content, 0o644); err != nil {
		n.Fatal(err)
	}
}

// identity waits for an identity.
func (n *node) identity(name string) Identity {
	n.Helper()
	if err := n.Resolve(n.Context(), name); err != nil {
		n.Fatal(err)
	}
	id, err := n.Identity(name)
	if err != nil {
		n.Fatal(err)
	}
	return id
}

// refuses checks that an error is the right one and says the right words.
func refuses(t testing.TB, err, want error, says ...string) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%v, want %v", err, want)
		return
	}
	for _, s := range says {
		if !strings.Contains(err.Error(), s) {
			t.Errorf("does not say %q: %v", s, err)
		}
	}
	for _, fault := range plain.Faults(err.Error()) {
		t.Errorf("%s: %v", fault, err)
	}
}

func digestOfBytes(b []byte) string { return fmt.Sprintf("sha256:%x", sha256.Sum256(b)) }

// tarball is a compressed archive of one file.
func tarball(t testing.TB, name, content string) []byte {
	t.Helper()
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	w := tar.NewWriter(z)
	err := w.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Size: int64(len(content)), Mode: 0o644})
	if err == nil {
		_, err = io.WriteString(w, content)
	}
	if err = errors.Join(err, w.Close(), z.Close()); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// TestReplacedWhileItWaited asks for the digest of a file that was replaced before its turn came. The new file would
// take half an hour to read, and the result would be thrown away.
func TestReplacedWhileItWaited(t *testing.T) {
	n := newNode(t)
	n.list()
	n.put("a", []byte("old"))
	f, old, err := n.open("a")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close() // so that its inode is not used again
	n.put("a", []byte("new"))
	if err := os.Truncate(filepath.Join(n.cfg.Dir, "a"), 1<<40); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	_, err = n.digestOfFile(ctx, Content{Kind: Tar, File: "a"}, old)
	refuses(t, err, ErrChanged, "a was written to or replaced")
}

// TestCheck asks for contents in the name of several namespaces.
func TestCheck(t *testing.T) {
	n := newNode(t)
	n.list("- {name: ours, tar: a, namespaces: [ci]}", "- {name: theirs, tar: b, namespaces: [secret]}",
		`- {name: free, tar: c, namespaces: ["*"]}`, "- {name: bad, tar: c, namespaces: [ci], size: huge}")
	for _, ok := range [][2]string{{"ours", "ci"}, {"theirs", "secret"}, {"free", "ci"}, {"free", "anything"}, {"free", ""}} {
		if err := n.Check(ok[0], ok[1]); err != nil {
			t.Error(err)
		}
	}
	for _, no := range [][2]string{{"ours", "secret"}, {"theirs", "ci"}, {"ours", ""}, {"ours", "*"}, {"ours", "ci,secret"}, {"bad", "ci"}, {"", "ci"}} {
		refuses(t, n.Check(no[0], no[1]), ErrUnknown)
	}
	refuses(t, n.Check("theirs", "ci"), ErrUnknown, `namespace "ci" may not use it; what it may use: free, ours`)
	// Nobody can tell a content of others from one that does not exist.
	theirs, nothing := n.Check("theirs", "ci").Error(), n.Check("nothing", "ci").Error()
	if strings.ReplaceAll(theirs, "theirs", "nothing") != nothing {
		t.Errorf("%s\nand\n%s", theirs, nothing)
	}
	n.list("- {name: theirs, tar: b, namespaces: [secret]}")
	refuses(t, n.Check("theirs", "ci"), ErrUnknown, "what it may use: none")
}

// TestIdentityOfFile follows a file through changes.
func TestIdentityOfFile(t *testing.T) {
	n := newNode(t)
	n.list(`- {name: a, tar: a.tar, namespaces: [ci], mode: "0700"}`)
	_, err := n.Identity("a")
	refuses(t, err, ErrUnavailable, `content "a"`, n.cfg.Dir+"/a.tar", "no such file")
	_, err = n.Identity("b")
	refuses(t, err, ErrUnknown, "not listed")
	refuses(t, n.Resolve(t.Context(), "b"), ErrUnknown)

	n.put("a.tar", []byte("one"))
	if _, err := n.Identity("a"); !errors.Is(err, ErrResolving) {
		t.Errorf("the first call: %v", err)
	}
	first := n.identity("a")
	if first.Digest != digestOfBytes([]byte("one")) || first.Kind != Tar || *first.Options.Mode != 0o700 {
		t.Errorf("it is %+v", first)
	}
	n.put("a.tar", []byte("two"))
	if second := n.identity("a"); second.Digest != digestOfBytes([]byte("two")) || second.Equal(first) {
		t.Errorf("replaced, it is %+v", second)
	}
	f, err := os.OpenFile(filepath.Join(n.cfg.Dir, "a.tar"), os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString("+"); err != nil {
		t.Fatal(err)
	}
	third := n.identity("a")
	if third.Digest != digestOfBytes([]byte("two+")) {
		t.Errorf("written to, it is %+v", third)
	}
	n.list(`- {name: a, tar: a.tar, namespaces: [ci], mode: "0701"}`)
	if id := n.identity("a"); id.Digest != third.Digest || id.Equal(third) {
		t.Errorf("with another mode it is %+v", id)
	}
}

// TestHostileFiles has files in the directory of contents that are none.
func TestHostileFiles(t *testing.T) {
	n := newNode(t)
	n.list("- {name: a, tar: a, namespaces: [ci]}")
	secret := filepath.Join(n.dir, "secret")
	n.write(secret, []byte("secret"))
	at := filepath.Join(n.cfg.Dir, "a")
	if err := os.Symlink(secret, at); err != nil {
		t.Fatal(err)
	}
	refuses(t, n.Resolve(t.Context(), "a"), ErrUnavailable, "is a symbolic link; put the file itself there")
	_, err := n.Prepare(t.Context(), "a", Identity{digestOfBytes([]byte("secret")), Tar, Options{}})
	refuses(t, err, ErrUnavailable, "symbolic link")
	if err := errors.Join(os.Remove(at), os.Mkdir(at, 0o755)); err != nil {
		t.Fatal(err)
	}
	refuses(t, n.Resolve(t.Context(), "a"), ErrUnavailable, "not a regular file")
	n.cfg.Dir = filepath.Join(n.dir, "nothing")
	n.restart()
	refuses(t, n.Resolve(t.Context(), "a"), ErrUnavailable, "no such file")
	n.cfg.Dir = ""
	n.restart()
	refuses(t, n.Resolve(t.Context(), "a"), ErrUnavailable, "no directory of contents")
}

// TestRemembered starts again: a digest that is known is not found out again, and a state that is damaged is none.
func TestRemembered(t *testing.T) {
	n := newNode(t)
	n.put("a.tar", []byte("one"))
	n.list("- {name: a, tar: a.tar, namespaces: [ci]}")
	want := n.identity("a")
	n.restart()
	saved, err := os.ReadFile(n.cfg.State)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := n.Identity("a"); err != nil || !got.Equal(want) {
		t.Errorf("after a restart: %+v, %v", got, err)
	}
	for _, damaged := range []string{"", "{", `{"version": 2}`, strings.Replace(string(saved), "sha256:", "sha256;", 1)} {
		n.stop()
		n.write(n.cfg.State, []byte(damaged))
		n.restart()
		if _, err := n.Identity("a"); !errors.Is(err, ErrResolving) {
			t.Errorf("with the state %q: %v", damaged, err)
		}
		if got := n.identity("a"); !got.Equal(want) {
			t.Errorf("with the state %q: %+v", damaged, got)
		}
	}
}

// TestTags asks a registry whose tag moves and which fails at times.
func TestTags(t *testing.T) {
	n := newNode(t)
	n.write(n.cfg.Path, []byte("contents:\n- {name: a, oci: quay.io/a:1, namespaces: [ci]}\n- {name: b, oci: quay.io/a@"+sha+", namespaces: [ci]}"))
	n.cfg.State = "" // writing it would not be durably blocked
	synctest.Test(t, func(t *testing.T) {
		var asked int
		digest, failure := "", errors.New("no route to host")
		n.cfg.Resolve = func(_ context.Context, reference string) (string, error) {
			if asked++; reference != "quay.io/a:1" {
				t.Errorf("asked for %s", reference)
			}
			return digest, failure
		}
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		c := New(ctx, n.cfg)
		look := func(want string, times int) {
			t.Helper()
			if id, err := c.Identity("a"); err != nil || id.Digest != want {
				t.Errorf("it is %+v, %v, want %s", id, err, want)
			}
			synctest.Wait()
			if asked != times {
				t.Errorf("the registry was asked %d times, want %d", asked, times)
			}
		}
		if id, err := c.Identity("b"); err != nil || id.Digest != sha {
			t.Errorf("a digest is one: %+v, %v", id, err)
		}
		refuses(t, c.Resolve(ctx, "a"), ErrUnavailable, `content "a"`, "no route to host")
		refuses(t, c.Resolve(ctx, "a"), ErrUnavailable, "no route to host")
		if asked != 1 {
			t.Errorf("asked %d times within seconds", asked)
		}
		one, two := digestOfBytes([]byte("1")), digestOfBytes([]byte("2"))
		digest, failure = one, nil
		time.Sleep(retryAfter)
		if err := c.Resolve(ctx, "a"); err != nil {
			t.Fatal(err)
		}
		look(one, 2)
		digest = two // the tag moves
		time.Sleep(tagLife - time.Second)
		look(one, 2)
		time.Sleep(time.Second)
		look(one, 3) // the last answer counts until there is a new one
		look(two, 3)
		failure = errors.New("no route to host")
		time.Sleep(tagLife)
		look(two, 4)
		look(two, 4)
		found := c.Conditions()
		if len(found) != 1 || found[0].Object != "a" || !strings.Contains(found[0].Message(), "no route to host") {
			t.Errorf("conditions are %+v", found)
		}
		time.Sleep(retryAfter)
		failure = nil
		look(two, 5)
		if found := c.Conditions(); len(found) != 0 {
			t.Errorf("conditions are %+v", found)
		}
		digest = "latest"
		time.Sleep(tagLife)
		look(two, 6)
		if found := c.Conditions(); len(found) != 1 || !strings.Contains(found[0].Message(), `"latest" is no digest`) {
			t.Errorf("conditions are %+v", found)
		}
	})
}

// TestTagsAfterRestart: the digest of an earlier process counts only if the registry cannot be asked.
func TestTagsAfterRestart(t *testing.T) {
	n := newNode(t)
	one, two := digestOfBytes([]byte("1")), digestOfBytes([]byte("2"))
	var digest atomic.Value
	digest.Store(one)
	n.cfg.Resolve = func(context.Context, string) (string, error) {
		if d := digest.Load().(string); d != "" {
			return d, nil
		}
		return "", errors.New("no route to host")
	}
	n.list("- {name: a, oci: quay.io/a:1, namespaces: [ci]}")
	restart := func(say, want string) {
		t.Helper()
		n.stop()
		digest.Store(say)
		n.restart()
		if id := n.identity("a"); id.Digest != want {
			t.Errorf("it is %s, want %s", id.Digest, want)
		}
	}
	n.identity("a")
	restart("", one)
	restart(two, two)
}

// TestResolveEnds: a caller does not wait longer than it wants to.
func TestResolveEnds(t *testing.T) {
	n := newNode(t)
	n.cfg.Resolve = func(ctx context.Context, _ string) (string, error) { <-ctx.Done(); return "", ctx.Err() }
	n.list("- {name: a, oci: quay.io/a:1, namespaces: [ci]}")
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	err := n.Resolve(ctx, "a")
	refuses(t, err, ErrResolving, `content "a"`)
	refuses(t, err, context.DeadlineExceeded)
}

// TestPrepareFile makes archives of files.
func TestPrepareFile(t *testing.T) {
	n := newNode(t)
	n.put("a.tar.gz", tarball(t, "etc/motd", "hello"))
	n.list("- {name: a, tar: a.tar.gz, namespaces: [ci]}")
	p, err := n.Prepare(t.Context(), "a", n.identity("a"))
	if err != nil {
		t.Fatal(err)
	}
	defer p.File.Close()
	if len(p.Layers) != 1 || p.Summary.Entries != 1 || p.Summary.Bytes != 5 {
		t.Errorf("prepared %+v", p)
	}
	if got := motd(t, p.File, p.Layers[0]); got != "hello" {
		t.Errorf("it says %q", got)
	}
	if s, ok := n.Measured(n.identity("a")); !ok || s != p.Summary {
		t.Errorf("measured is %+v", s)
	}
	n.put("a.tar.gz", tarball(t, "etc/motd", "bye"))
	if s, ok := n.Measured(n.identity("a")); ok {
		t.Errorf("measured is %+v, of another file", s)
	}
}

// motd reads the one file of an archive.
func motd(t testing.TB, f *os.File, l archive.Layer) string {
	t.Helper()
	r := tar.NewReader(io.NewSectionReader(f, l.Offset, l.Length))
	if _, err := r.Next(); err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return string(got)
}

// TestPrepareImage makes archives of layers.
func TestPrepareImage(t *testing.T) {
	n := newNode(t)
	var failure error
	n.cfg.Layers = func(_ context.Context, reference string) iter.Seq2[io.Reader, error] {
		return func(yield func(io.Reader, error) bool) {
			if reference != "quay.io/a@"+sha {
				t.Errorf("asked for %s", reference)
			}
			if yield(bytes.NewReader(tarball(t, "a", "lower")), nil) && yield(bytes.NewReader(tarball(t, "a", "upper")), failure) {
				return
			}
		}
	}
	n.list("- {name: a, oci: quay.io/a:1@"+sha+", namespaces: [ci]}", "- {name: d, disk: oci://quay.io/a@"+sha+", namespaces: [ci]}")
	p, err := n.Prepare(t.Context(), "a", n.identity("a"))
	if err != nil {
		t.Fatal(err)
	}
	defer p.File.Close()
	if len(p.Layers) != 2 || p.Summary.Entries != 2 || motd(t, p.File, p.Layers[1]) != "upper" {
		t.Errorf("prepared %+v", p)
	}
	failure = errors.New("no route to host")
	_, err = n.Prepare(t.Context(), "a", n.identity("a"))
	refuses(t, err, failure, "layer 2 of quay.io/a@"+sha, `content "a"`)
	_, err = n.Prepare(t.Context(), "d", n.identity("d"))
	refuses(t, err, ErrUnavailable)
}

// TestPrepareChanged has a file changed at each moment.
func TestPrepareChanged(t *testing.T) {
	n := newNode(t)
	good := tarball(t, "a", strings.Repeat("hello", 1000))
	path := filepath.Join(n.cfg.Dir, "a")
	n.put("a", good)
	n.list("- {name: a, tar: a, namespaces: [ci]}")
	var id Identity
	for name, change := range map[string]func(){
		"replaced":  func() { n.put("a", tarball(t, "a", "other")) },
		"truncated": func() { n.write(path, good[:50]) },
		"destroyed": func() { n.write(path, []byte("no tar")) },
		"written":   func() { n.write(path, good) }, // with what it had
		"looked at": func() { n.put("a", tarball(t, "a", "other")); n.identity("a") },
	} {
		n.put("a", good)
		id = n.identity("a")
		change()
		_, err := n.Prepare(t.Context(), "a", id)
		refuses(t, err, ErrChanged, `content "a"`, "try again")
		if again := n.identity("a"); again.Equal(id) != (name == "written") {
			t.Errorf("%s: it is %+v, was %+v", name, again, id)
		}
	}

	for name, change := range map[string]func() error{
		"removed": func() error { return nil },
		"a link":  func() error { return os.Symlink("b", path) }, // to the same bytes
	} {
		n.put("a", good)
		n.put("b", good)
		id = n.identity("a")
		if err := errors.Join(os.Remove(path), change()); err != nil {
			t.Fatal(err)
		}
		if _, err := n.Prepare(t.Context(), "a", id); !errors.Is(err, ErrUnavailable) {
			t.Errorf("%s: %v", name, err)
		}
		if err := os.RemoveAll(path); err != nil {
			t.Fatal(err)
		}
	}

	// While it is read.
	n.list("- {name: a, disk: a, namespaces: [ci]}")
	for name, change := range map[string]func(){
		"truncated": func() { n.write(path, good[:50]) },
		"the same":  func() { n.write(path, good) },
	} {
		n.put("a", good)
		id = n.identity("a")
		n.Contents.cfg.Convert = func(context.Context, *os.File, *os.File) error { change(); return nil }
		if _, err := n.Prepare(t.Context(), "a", id); !errors.Is(err, ErrChanged) {
			t.Errorf("%s while it is read: %v", name, err)
		}
	}
	n.list("- {name: a, tar: a, namespaces: [ci]}")

	// A digest that was remembered and is wrong is found out again.
	n.put("a", good)
	id = n.identity("a")
	n.stop()
	saved, err := os.ReadFile(n.cfg.State)
	if err != nil {
		t.Fatal(err)
	}
	n.write(n.cfg.State, bytes.ReplaceAll(saved, []byte(id.Digest), []byte(sha)))
	n.restart()
	_, err = n.Prepare(t.Context(), "a", n.identity("a"))
	refuses(t, err, ErrChanged)
	if again := n.identity("a"); !again.Equal(id) {
		t.Errorf("after a wrong digest it is %+v", again)
	}
	n.list(`- {name: a, tar: a, namespaces: [ci], mode: "0700"}`)
	_, err = n.Prepare(t.Context(), "a", id)
	refuses(t, err, ErrChanged, "its entry in the list is another one")
	n.list("- {name: b, tar: a, namespaces: [ci]}")
	_, err = n.Prepare(t.Context(), "a", id)
	refuses(t, err, ErrUnknown)
}

// TestPrepareDisk converts a file.
func TestPrepareDisk(t *testing.T) {
	n := newNode(t)
	n.put("d.qcow2", []byte("a disk"))
	n.list("- {name: d, disk: d.qcow2, namespaces: [ci]}")
	id := n.identity("d")
	_, err := n.Prepare(t.Context(), "d", id)
	refuses(t, err, ErrUnavailable, "converts no disks")
	n.Contents.cfg.Convert = func(_ context.Context, dst, src *os.File) error {
		_, err := io.Copy(dst, src)
		return err
	}
	p, err := n.Prepare(t.Context(), "d", id)
	if err != nil {
		t.Fatal(err)
	}
	defer p.File.Close()
	got := make([]byte, 100)
	if length, _ := p.File.ReadAt(got, 0); string(got[:length]) != "a disk" || p.Layers != nil {
		t.Errorf("prepared %+v with %q", p, got[:length])
	}
}

// TestPrepareRefused passes on what an archive is refused for.
func TestPrepareRefused(t *testing.T) {
	n := newNode(t)
	n.put("a", []byte("no tar at all"))
	n.put("b", tarball(t, "../b", "hello"))
	n.list("- {name: a, tar: a, namespaces: [ci]}", "- {name: b, tar: b, namespaces: [ci]}")
	_, err := n.Prepare(t.Context(), "a", n.identity("a"))
	refuses(t, err, archive.ErrDamaged, `content "a": damaged archive`)
	_, err = n.Prepare(t.Context(), "b", n.identity("b"))
	refuses(t, err, archive.ErrRefused, `content "b"`, `entry "../b"`)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = n.Prepare(ctx, "a", n.identity("a"))
	refuses(t, err, context.Canceled)
}

// TestConditions checks what is said of lists and sources.
func TestConditions(t *testing.T) {
	n := newNode(t)
	n.restart()
	says := func(want ...string) {
		t.Helper()
		found := n.Conditions()
		if len(found) != len(want) {
			t.Errorf("%d conditions, want %d: %+v", len(found), len(want), found)
			return
		}
		for i, c := range found {
			if c.Code != health.ContentFailed || !c.StillReady || c.Object == "" || !strings.Contains(c.Message(), want[i]) {
				t.Errorf("%+v\nwant %s", c, want[i])
			}
			for _, fault := range plain.Faults(c.Message()) {
				t.Errorf("%s: %s", fault, c.Message())
			}
		}
	}
	says("the list of contents cannot be read: open " + n.cfg.Path)
	n.put("a", []byte("a"))
	n.write(n.cfg.Path, []byte("contents:\n- {name: a, tar: a, namespaces: [ci]}\n- {name: b, tar: b, namespaces: [ci]}\n- {name: c}\n"))
	n.Contents.list.Look()
	says("entry 3 (c) of the list of contents "+n.cfg.Path+" is left out: namespaces is missing", `content "b": its source is not available: `)
	n.write(n.cfg.Path, []byte("contents: ["))
	n.Contents.list.Look()
	n.Contents.list.Look()
	says("the list of contents "+n.cfg.Path+": it is no valid YAML; the parser says \"line 1: ", "entry 3 (c)", `content "b"`)
	if _, err := n.Find("a"); err != nil {
		t.Errorf("what the list said before does not count: %v", err)
	}
	n.write(n.cfg.Path, []byte("contents: []"))
	n.Contents.list.Look()
	says()
}

// TestRun takes in a list that changes, and looks at its files before anybody asks.
func TestRun(t *testing.T) {
	n := newNode(t)
	n.put("a", []byte("a"))
	n.list("- {name: a, tar: a, namespaces: [ci]}")
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); n.Run(ctx) }()
	for saved := []byte{}; !bytes.Contains(saved, []byte(digestOfBytes([]byte("a")))); saved, _ = os.ReadFile(n.cfg.State) {
		time.Sleep(time.Millisecond)
	}
	if _, err := n.Identity("a"); err != nil {
		t.Error(err)
	}
	cancel()
	<-done
}

// TestDigestOfDisk reads disks that are larger than anybody has time to read. What tells them apart are their data,
// where they are, and the length.
func TestDigestOfDisk(t *testing.T) {
	disk := func(length int64, at ...int64) string {
		t.Helper()
		f, err := os.CreateTemp(t.TempDir(), "disk")
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		for _, off := range at {
			if _, err := f.WriteAt([]byte("data"), off); err != nil {
				t.Fatal(err)
			}
		}
		if err := f.Truncate(length); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		digest, err := hashed(t.Context(), f, Disk)
		if err != nil || time.Since(began) > time.Minute {
			t.Fatalf("after %s: %v", time.Since(began), err)
		}
		return digest
	}
	const large = 1 << 40
	seen := map[string]string{}
	for name, digest := range map[string]string{
		"empty": disk(large), "shorter": disk(large - 4096), "begun": disk(large, 0), "ended": disk(large, large-4), "both": disk(large, 0, large-4),
	} {
		if other, twice := seen[digest]; twice || !isDigest.MatchString(digest) {
			t.Errorf("%s and %s have the digest %s", name, other, digest)
		}
		seen[digest] = name
	}
	if one, two := disk(large, 4096), disk(large, 4096); one != two {
		t.Errorf("two disks with the same data have the digests %s and %s", one, two)
	}
}
