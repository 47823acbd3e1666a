// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package prewarm

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/internal/plain"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/health"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/watchedfile"
)

func specOf(t testing.TB, text string) diskfs.Spec {
	t.Helper()
	spec, err := diskfs.ParseSpec(text)
	if err != nil {
		t.Fatal(err)
	}
	return spec
}

func TestParse(t *testing.T) {
	specs, bad := parse([]byte(`# what the shop uses
xfs:10Gi
   ext4:1Gi:inode-size=512	# databases
#ext4:2Gi
xfs:10GB
xfs:10240Mi
ext4:1Gi:label=#
raw:1Gi` + "\r\n\r\n\x00\n\xff:1Gi\nbtrfs:1Gi\r\nxfs:10Gi,ext4:1Gi"))
	if got, want := fmt.Sprint(specs), "[xfs 10Gi ext4 1Gi inode-size=512 ext4 1Gi btrfs 1Gi]"; got != want {
		t.Errorf("read %s, want %s", got, want)
	}
	var numbers []int
	for _, b := range bad {
		numbers = append(numbers, b.number)
	}
	if got, want := fmt.Sprint(numbers), "[5 8 10 11 13]"; got != want {
		t.Errorf("bad are the lines %s, want %s", got, want)
	}
	says := []string{`"xfs:10GB": size "10GB"`, "btrfs, ext4, xfs", "FILESYSTEM:SIZE", "btrfs, ext4, xfs", `"10Gi,ext4"`}
	for i, says := range says {
		if !strings.Contains(bad[i].err.Error(), says) {
			t.Errorf("line %d: %v, want %s", bad[i].number, bad[i].err, says)
		}
	}
	var many bytes.Buffer
	for i := range maxListed + 2 {
		fmt.Fprintf(&many, "xfs:%dMi\nxfs:300Mi\n", 300+i)
	}
	specs, bad = parse(many.Bytes())
	if len(specs) != maxListed || len(bad) != 2 || bad[0].number != 2*maxListed+1 || !strings.Contains(bad[0].err.Error(), "list fewer") {
		t.Errorf("of %d templates %d count; bad are %v", maxListed+2, len(specs), bad)
	}
}

// configMap is a directory as kubelet makes it for a volume of a ConfigMap.
type configMap struct {
	*testing.T
	dir     string
	version int
}

// replace gives the file another content by exchanging a symbolic link.
func (m *configMap) replace(content string) {
	m.Helper()
	m.version++
	version := fmt.Sprintf("..version-%d", m.version)
	in := func(name string) string { return filepath.Join(m.dir, name) }
	steps := []error{
		os.Mkdir(in(version), 0o755), os.WriteFile(in(version+"/templates"), []byte(content), 0o644),
		os.Symlink(version, in("..data_tmp")), os.Rename(in("..data_tmp"), in("..data")),
	}
	if m.version == 1 {
		steps = append(steps, os.Symlink("..data/templates", in("templates")))
	} else {
		steps = append(steps, os.RemoveAll(in(fmt.Sprintf("..version-%d", m.version-1))))
	}
	for _, err := range steps {
		if err != nil {
			m.Fatal(err)
		}
	}
}

func TestFile(t *testing.T) {
	dir := t.TempDir()
	f := file{File: watchedfile.File{Path: filepath.Join(dir, "templates")}}
	look := func(changed bool, want string, says ...string) {
		t.Helper()
		got, err := f.look()
		if got != changed || (err != nil) != (len(says) > 0) {
			t.Errorf("changed is %v, want %v: %v", got, changed, err)
		}
		for _, s := range says {
			if !strings.Contains(fmt.Sprint(err), s) {
				t.Errorf("%v does not say %s", err, s)
			}
		}
		if got := fmt.Sprint(f.specs); got != want {
			t.Errorf("it lists %s, want %s", got, want)
		}
	}
	look(false, "[]", f.Path, "no such file")
	m := &configMap{t, dir, 0}
	m.replace("xfs:10Gi\n")
	look(true, "[xfs 10Gi]")
	look(false, "[xfs 10Gi]")
	m.replace("xfs:10Gi\n") // another file of the same content
	look(false, "[xfs 10Gi]")
	m.replace("ext4:10Gi\nmore\n")
	look(true, "[ext4 10Gi]")
	if len(f.bad) != 1 {
		t.Errorf("bad are %v", f.bad)
	}
	m.replace(strings.Repeat("#", 1<<20+1))
	look(false, "[ext4 10Gi]", f.Path, "1Mi")
	m.replace(strings.Repeat("#", 1<<20-9) + "\nxfs:1Gi\n")
	look(true, "[xfs 1Gi]")
	if err := os.WriteFile(f.Path, []byte("xfs:2Gi\n"), 0o644); err != nil { // in place
		t.Fatal(err)
	}
	look(true, "[xfs 2Gi]")
	if err := os.Remove(f.Path); err != nil {
		t.Fatal(err)
	}
	look(false, "[xfs 2Gi]", f.Path, "no such file")
	if err := syscall.Mkfifo(f.Path, 0o600); err != nil {
		t.Fatal(err)
	}
	look(false, "[xfs 2Gi]", f.Path, "not a regular file")
	f = file{File: watchedfile.File{Path: dir}}
	look(false, "[]", dir, "not a regular file")
	f = file{}
	look(false, "[]")
}

func TestPause(t *testing.T) {
	for tries, want := range map[int]time.Duration{
		0: time.Minute, 1: time.Minute, 2: 2 * time.Minute, 6: 32 * time.Minute, 7: time.Hour, 1 << 40: time.Hour,
	} {
		if got := pause(tries); got != want {
			t.Errorf("after %d tries: %s, want %s", tries, got, want)
		}
	}
}

// TestRelist changes a list of which one was tried.
func TestRelist(t *testing.T) {
	a, b, c := specOf(t, "ext4:1Gi"), specOf(t, "ext4:1Gi:label=b"), specOf(t, "xfs:1Gi")
	list := relist(nil, []diskfs.Spec{a, b, a})
	if len(list) != 2 {
		t.Fatalf("%d are listed, want 2", len(list))
	}
	now := time.Now()
	list[1].note(errGone, now)
	list = relist(list, []diskfs.Spec{c, b})
	if len(list) != 2 || !list[0].untried() || !list[1].failing() || list[1].due(now) || !list[1].due(now.Add(time.Minute)) {
		t.Errorf("listed are %+v and %+v", list[0], list[1])
	}
	list[1].note(nil, now)
	if !list[1].there() || list[1].due(now.Add(time.Hour)) ||
		first(list, (*listed).there) != list[1] || first(list, (*listed).failing) != nil {
		t.Errorf("after it was built: %+v", list[1])
	}
	list[1].miss(errGone, now)
	if list[1].due(now.Add(time.Minute)) || !list[1].due(now.Add(2*time.Minute)) {
		t.Errorf("one that is gone again and again is tried after %s", list[1].again.Sub(now))
	}
}

// TestConditions checks what is said of templates that are not there.
func TestConditions(t *testing.T) {
	p := &Prewarmer{cfg: Config{File: "/etc/templates", Wait: true}}
	for i := range 30 {
		p.list = append(p.list, &listed{spec: specOf(t, fmt.Sprintf("xfs:%dGi", i+1))})
	}
	pending := p.Pending()
	if len(pending) != 1 || pending[0].StillReady || pending[0].Code != health.PrewarmPending {
		t.Fatalf("pending is %+v", pending)
	}
	message := pending[0].Message()
	for _, says := range []string{"30 of 30", "xfs 1Gi, xfs 2Gi, xfs 3Gi, xfs 4Gi, xfs 5Gi and 25 more", "--wait-for-prewarm"} {
		if !strings.Contains(message, says) {
			t.Errorf("does not say %s: %s", says, message)
		}
	}
	for _, l := range p.list {
		l.note(errGone, time.Now())
	}
	if pending := p.Pending(); len(pending) != 0 {
		t.Errorf("all were tried: %v", pending)
	}
	p.settled = true
	p.list = append(p.list, &listed{spec: specOf(t, "ext4:1Gi")})
	if pending := p.Pending(); len(pending) != 0 {
		t.Errorf("one was listed later: %v", pending)
	}
	p.unread = &os.PathError{Op: "open", Path: p.cfg.File, Err: syscall.ENOENT}
	_, p.bad = parse([]byte("xfs:10Gi\n" + strings.Repeat("nothing\n", 100)))
	found := p.Conditions()
	if len(found) != 1+2*maxShown || found[1].Object != "/etc/templates:2" || found[1+maxShown].Object != "xfs 1Gi" {
		t.Errorf("%d conditions", len(found))
	}
	seen := map[string]bool{}
	for _, c := range found {
		if c.Code != health.PrewarmFailed || !c.StillReady || c.Object == "" || seen[c.Object] {
			t.Errorf("%+v", c)
		}
		seen[c.Object] = true
		for _, fault := range plain.Faults(c.Message()) {
			t.Errorf("%s: %s", fault, c.Message())
		}
	}
	if counts := p.Counts(); counts != (Counts{There: 0, Missing: 1, Failing: 30}) {
		t.Errorf("counted %+v", counts)
	}
}
