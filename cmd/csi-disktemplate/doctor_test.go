// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/health"
)

// TestFindingLines checks that the lines are aligned, and that each says what to do below.
func TestFindingLines(t *testing.T) {
	const want = `good      pool:         it is there
degraded  accelerator:  no KVM
                        costs: it is slow
                        do: get KVM
                        since: 1970-01-01T00:01:00Z
broken    mkfs:         no mkfs.xfs; no mkfs.btrfs
                        do: install them
`
	got := findingLines([]health.Finding{
		{State: health.StateGood, Requirement: "pool", Text: "it is there"},
		{State: health.StateDegraded, Requirement: "accelerator", Text: "no KVM", Cost: "it is slow", Remedy: "get KVM", Since: time.Unix(60, 0)},
		{State: health.StateBroken, Requirement: "mkfs", Text: "no mkfs.xfs\nno mkfs.btrfs", Remedy: "install them"},
	})
	if got != want {
		t.Errorf("the lines are\n%s", got)
	}
}

// TestHungLook: doctor ends where a look at the node does not, and says so.
func TestHungLook(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hang, why := make(chan bool), errors.New("it cannot look")
		found, err := within(patienceBeside, func() ([]health.Finding, error) { <-hang; return nil, why })
		if err != nil || health.Worst(found) != health.StateBroken || found[0].Remedy == "" {
			t.Errorf("%+v: %v", found, err)
		}
		close(hang)
		if found, err := within(patienceBeside, func() ([]health.Finding, error) { <-hang; return nil, why }); found != nil || !errors.Is(err, why) {
			t.Errorf("%+v: %v", found, err)
		}
	})
}

// TestExitCode checks that doctor ends with 2 if it cannot look, without losing why, and other commands with 1.
func TestExitCode(t *testing.T) {
	why := errors.New("why")
	for name, c := range map[string]struct {
		err   error
		code  int
		print bool
	}{
		"another command":     {why, 1, true},
		"degraded":            {&exit{code: exitDegraded}, 1, false},
		"broken":              {&exit{code: exitBroken}, 2, false},
		"doctor cannot look":  {unwell(why), 2, true},
		"doctor's bad flag":   {run("doctor", "--wrong"), 2, true},
		"doctor's bad value":  {run("doctor", "-o", "wide"), 2, true},
		"doctor's bad word":   {run("doctor", "well"), 2, true},
		"several plugins run": {unwell(errors.New("give --pool")), 2, true},
	} {
		if code, print := exitCode(c.err); code != c.code || print != c.print {
			t.Errorf("%s: exit code %d, printed: %v", name, code, print)
		}
	}
	if unwell(nil) != nil || !errors.Is(unwell(why), why) {
		t.Error("an error is lost")
	}
}

// run runs a command that must fail before it does anything.
func run(args ...string) error {
	cmd := newCommand()
	cmd.SetArgs(args)
	return cmd.Execute()
}

// TestDoctorOptions checks whose flags count: given ones, those of a plugin that runs, and defaults.
func TestDoctorOptions(t *testing.T) {
	t.Setenv("KUBELET_DIR", "")
	o := doctorOptions{}.options(nil)
	if o.pool.Dir != defaultPool || o.kubeletDir != "/var/lib/kubelet" || o.driverName == "" || o.headroom.Of(100) != 5 {
		t.Errorf("by default: %+v", o)
	}
	plugin := &running{options: o}
	plugin.options.pool.Dir, plugin.options.kubeletDir = "/its/pool", "/its/kubelet"
	if o := (doctorOptions{}).options(plugin); o.pool.Dir != "/its/pool" || o.kubeletDir != "/its/kubelet" || o.pool.NodeDir != "/its/kubelet" {
		t.Errorf("of a plugin that runs: %+v", o)
	}
	given := doctorOptions{pool: "/my/pool", kubeletDir: "/my/kubelet", loopbackSize: 1 << 30}
	if o := given.options(plugin); o.pool.Dir != "/my/pool" || o.kubeletDir != "/my/kubelet" || o.pool.LoopbackSize != 1<<30 {
		t.Errorf("given: %+v", o)
	}
}
