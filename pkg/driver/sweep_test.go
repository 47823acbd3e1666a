// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package driver

import (
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/sweep"
)

// leaveBehind publishes a volume, kills the plugin and removes all of the pod's directory. A node that was rebooted and
// forgot the pod looks the same.
func (p *plugin) leaveBehind(id string) {
	p.t.Helper()
	r := p.request(id, "ext4", "size", "64Mi")
	p.publish(r)
	p.Kill()
	testenv.Run(p.t, "umount", r.TargetPath)
	testenv.NoLoopsBelow(p.t, p.Pool)
	if err := os.RemoveAll(p.PodDir(uidOf(id))); err != nil {
		p.t.Fatal(err)
	}
}

// TestSweep leaves volumes behind. The command gc shows and deletes them, a plugin that starts does so before it serves,
// and a running plugin does so by its timer.
func TestSweep(t *testing.T) {
	n := newNode(t, testenv.Btrfs, 1<<30)
	n.start().leaveBehind("by-command")
	gc := func(flags ...string) []sweep.Action {
		t.Helper()
		out, err := exec.Command(testenv.Binary(t), append([]string{"gc", "--pool", n.Pool, "--kubelet-dir", n.Kubelet, "-o", "json"}, flags...)...).Output()
		if err != nil {
			t.Fatal(err)
		}
		var plan struct{ Actions []sweep.Action }
		if err := json.Unmarshal(out, &plan); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return plan.Actions
	}
	for _, c := range []struct {
		flags  []string
		result string
	}{{[]string{"--dry-run"}, ""}, {[]string{"--dry-run"}, ""}, {nil, sweep.Done}} {
		a := gc(c.flags...)
		if len(a) != 1 || a[0].Verb != sweep.Delete || a[0].Object != "volume by-command" || a[0].Result != c.result {
			t.Errorf("gc %v: %+v", c.flags, a)
		}
	}
	if a := gc(); len(a) != 0 {
		t.Errorf("%+v", a)
	}
	n.mustHave("none")
	if code, out := testenv.Product(t, "gc", "--pool", n.Pool, "-o", "xml"); code != 1 || !strings.Contains(out, "json") {
		t.Errorf("exit code %d: %s", code, out)
	}

	n.start().leaveBehind("by-start")
	p := n.start("--sweep-interval", "100ms")
	n.mustHave("none")
	if p.metric("csi_disktemplate_sweep_actions_total") != 1 {
		t.Error("the sweep was not counted")
	}
	if sweep := p.log.lines("Sweep: delete", "by-start", "is gone"); len(sweep) != 1 {
		t.Errorf("the log says %q", sweep)
	}
	// A running plugin deletes a volume whose pod is gone.
	r := p.request("by-timer", "ext4", "size", "64Mi")
	p.publish(r)
	testenv.Run(t, "umount", r.TargetPath)
	if err := os.RemoveAll(n.PodDir(uidOf("by-timer"))); err != nil {
		t.Fatal(err)
	}
	p.await("a sweep", func() bool {
		_, err := os.Stat(filepath.Join(n.Pool, "volumes", "by-timer"))
		return errors.Is(err, os.ErrNotExist)
	})
}
