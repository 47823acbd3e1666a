// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package main

import (
	"errors"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/internal/harness"
	"github.com/csi-disktemplate/csi-disktemplate/internal/harness/harnesstest"
	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
)

// prewarmed is a plugin that builds templates though nobody calls it.
type prewarmed struct {
	*testing.T
	harness.Node
	*harness.Plugin
}

func startPrewarmed(t *testing.T, n harness.Node, env []string, flags ...string) *prewarmed {
	t.Helper()
	p := harnesstest.Launch(t, n, harness.Command{
		Binary: testenv.Binary(t), ID: "node1", Env: env,
		Flags: append([]string{"--accel", "tcg", "--http-endpoint", "127.0.0.1:0"}, flags...),
	})
	t.Cleanup(func() {
		p.Kill()
		if t.Failed() {
			t.Log(p.Tail())
		}
	})
	return &prewarmed{t, n, p}
}

// await waits for what may take some VMs.
func (p *prewarmed) await(what string, ok func() bool) {
	p.Helper()
	for deadline := time.Now().Add(90 * time.Second); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) || !p.Alive() {
			p.Fatalf("in vain for %s", what)
		}
	}
}

func (p *prewarmed) log() string {
	p.Helper()
	b, err := os.ReadFile(p.Log)
	if err != nil {
		p.Fatal(err)
	}
	return string(b)
}

// get returns a page of the plugin.
func (p *prewarmed) get(page string) (status int, body string) {
	p.Helper()
	var address []string
	p.await("the HTTP endpoint", func() bool {
		address = regexp.MustCompile(`"Serving health and metrics" address="([^"]+)"`).FindStringSubmatch(p.log())
		return address != nil
	})
	r, err := http.Get("http://" + address[1] + page)
	if err != nil {
		p.Fatal(err)
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	if err != nil {
		p.Fatal(err)
	}
	return r.StatusCode, string(b)
}

// templates returns the kinds of disks that the pool has templates of.
func (p *prewarmed) templates() (kinds []string) {
	p.Helper()
	found, err := filepath.Glob(filepath.Join(p.Pool, "templates", "*"))
	if err != nil {
		p.Fatal(err)
	}
	for _, path := range found {
		name := filepath.Base(path)
		kinds = append(kinds, name[:strings.LastIndexByte(name, '-')])
	}
	return kinds
}

// TestPrewarmed starts the plugin with lists of templates. They are there without a call, and until then the plugin
// is not ready. Nothing that fails keeps it from being ready in the end.
func TestPrewarmed(t *testing.T) {
	n := harnesstest.New(t, filepath.Join(testenv.XFS.Pool(t), "pool"))
	list := filepath.Join(testenv.Dir(t), "templates")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(list, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("# of the shop\next4:65Mi\next4:1GB\n")
	lists := []string{"--prewarm", "xfs:300Mi,ext4:64Mi:label=data:inode-size=512", "--prewarm-file", list, "--wait-for-prewarm"}
	p := startPrewarmed(t, n, nil, lists...)
	status, page := p.get("/readyz")
	t.Log(page)
	pending := regexp.MustCompile(`(?m)^PrewarmPending since .*3 of 3 .*xfs 300Mi, ext4 64Mi label=data inode-size=512, ext4 65Mi`)
	if status != http.StatusServiceUnavailable || !pending.MatchString(page) {
		t.Errorf("/readyz is %d: %s", status, page)
	}
	if !strings.Contains(page, "degraded: PrewarmFailed") || !strings.Contains(page, "line 3 of "+list+" is left out: ") {
		t.Errorf("/readyz says nothing of the bad line: %s", page)
	}
	if err := p.Serves(t.Context(), harnesstest.Connect(t, n)); err != nil {
		t.Fatal(err)
	}
	p.await("the plugin to be ready", func() bool {
		status, page = p.get("/readyz")
		return status == http.StatusOK
	})
	if got, want := p.templates(), []string{"ext4-64m", "ext4-65m", "xfs-300m"}; !slices.Equal(got, want) {
		t.Errorf("there are templates of %q, want %q; /readyz says %s", got, want, page)
	}
	_, page = p.get("/metrics")
	for _, line := range []string{
		`csi_disktemplate_prewarm_templates{state="there"} 3`, `csi_disktemplate_prewarm_templates{state="missing"} 0`,
		`csi_disktemplate_prewarm_templates{state="failing"} 0`, `csi_disktemplate_condition{code="PrewarmPending"} 0`,
		`csi_disktemplate_condition{code="PrewarmFailed"} 1`,
	} {
		if !strings.Contains(page, line+"\n") {
			t.Errorf("the metrics have no %s", line)
		}
	}
	write("ext4:66Mi\n")
	p.await("the template that was listed later", func() bool { return slices.Contains(p.templates(), "ext4-66m") })
	if got := strings.Count(p.log(), `"A condition began; the plugin is ready all the same" condition="PrewarmFailed"`); got != 1 {
		t.Errorf("the log has the bad line %d times", got)
	}
	if err := p.Stop(time.Minute); err != nil {
		t.Error(err)
	}

	write("ext4:66Mi\nbtrfs:200Mi\n")
	p = startPrewarmed(t, n, nil, append(lists, "--format-timeout", "1ms")...)
	p.await("the plugin to be ready", func() bool {
		status, page = p.get("/readyz")
		return status == http.StatusOK
	})
	failed := regexp.MustCompile(`(?m)^degraded: PrewarmFailed since .*btrfs 200Mi, which --prewarm.* lists, is not there: `)
	if !failed.MatchString(page) {
		t.Errorf("/readyz says nothing of the template that failed: %s", page)
	}
}

// TestPrewarmedAfterUpgrade replaces mkfs.ext4 by another of its kind. What was used lately is built anew, the latest
// first, though nobody lists it.
func TestPrewarmedAfterUpgrade(t *testing.T) {
	n := harnesstest.New(t, filepath.Join(testenv.XFS.Pool(t), "pool"))
	p := startPrewarmed(t, n, nil, "--prewarm", "ext4:64Mi,ext4:65Mi,ext4:66Mi")
	p.await("three templates", func() bool { return len(p.templates()) == 3 })
	if err := p.Stop(time.Minute); err != nil {
		t.Error(err)
	}
	ago := map[string]time.Duration{"ext4-64m": 2 * time.Hour, "ext4-65m": 8 * 24 * time.Hour, "ext4-66m": time.Hour}
	for kind, used := range ago {
		locks, err := filepath.Glob(filepath.Join(n.Pool, "locks", kind+"-*"))
		if err == nil && len(locks) != 1 {
			err = errors.New("there are other lockfiles")
		}
		if err == nil {
			err = os.Chtimes(locks[0], time.Time{}, time.Now().Add(-used))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	bin := testenv.Dir(t)
	mkfs, err := os.ReadFile("/usr/sbin/mkfs.ext4")
	if err == nil {
		err = os.WriteFile(filepath.Join(bin, "mkfs.ext4"), append(mkfs, "of another version"...), 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	p = startPrewarmed(t, n, []string{"PATH=" + bin + ":" + os.Getenv("PATH")})
	p.await("two templates to be built anew", func() bool { return len(p.templates()) == 5 })
	var order []string
	for _, m := range regexp.MustCompile(`"Built a template" template="(ext4-\d+m)-`).FindAllStringSubmatch(p.log(), -1) {
		order = append(order, m[1])
	}
	if want := []string{"ext4-66m", "ext4-64m"}; len(order) > 2 || !slices.Equal(order, want[:len(order)]) {
		t.Errorf("built were %q, want %q", order, want)
	}
}
