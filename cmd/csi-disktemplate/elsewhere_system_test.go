// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/internal/harness"
	"github.com/csi-disktemplate/csi-disktemplate/internal/harness/harnesstest"
	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
)

// inContainer makes a script that runs the product as a container does: in a mount namespace
// and a PID namespace of its own. The product ends with the script's process.
func inContainer(t *testing.T, keep ...string) string {
	t.Helper()
	script := filepath.Join(testenv.Dir(t), "plugin")
	text := fmt.Sprintf("#!/bin/sh\nexec unshare --mount --propagation private --pid --fork --kill-child sh -c '%s exec %s \"$@\"' sh \"$@\"\n",
		testenv.DropOthers(keep...), testenv.Binary(t))
	if err := os.WriteFile(script, []byte(text), 0o700); err != nil {
		t.Fatal(err)
	}
	return script
}

// jsonOf runs a command with -o json, and reads what it prints.
func jsonOf(t *testing.T, args ...string) (plan struct {
	Actions    []cleaning
	TakesBytes int64
	FreesBytes int64
}) {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), testenv.Binary(t), append(args, "-o", "json")...).Output()
	if err == nil {
		err = json.Unmarshal(out, &plan)
	}
	if err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return plan
}

// TestCommandsFindPool runs the operator's commands outside of the mount namespace in which the
// plugin has its loopback pool.
func TestCommandsFindPool(t *testing.T) {
	fs := testenv.Ext4.Mount(t, 600<<20)
	n := harnesstest.New(t, filepath.Join(fs, "pool"))
	const a, b = "ext4-64m-000000000000000a", "xfs-300m-000000000000000b"
	p, err := pool.Open(t.Context(), pool.Config{Dir: n.Pool, LoopbackSize: 400 << 20})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(
		os.WriteFile(p.Template(a), make([]byte, 64<<10), 0o400), os.WriteFile(p.Template(b), make([]byte, 8<<10), 0o400),
		os.WriteFile(p.Volume("notes"), nil, 0o600), p.Close(),
	); err != nil {
		t.Fatal(err)
	}
	testenv.Umount(t, p.Root())

	plugin := harnesstest.Launch(t, n, harness.Command{Binary: inContainer(t, fs, n.Kubelet), ID: "node1", Flags: []string{"--loopback-pool-size", "400Mi", "--accel", "tcg"}})
	stopped := false
	stop := func() {
		plugin.Kill()
		stopped = true
	}
	t.Cleanup(func() {
		if !stopped {
			stop()
		}
	})
	if err := plugin.Serves(t.Context(), harnesstest.Connect(t, n)); err != nil {
		t.Fatalf("%v\n%s", err, plugin.Tail())
	}
	if testenv.IsMounted(t, p.Root()) {
		t.Fatal("the plugin's pool is mounted here")
	}

	clean := []string{"clean-all", "--pool", n.Pool}
	for range 2 { // the first one changes nothing
		plan := jsonOf(t, append(clean, "--dry-run")...)
		if len(plan.Actions) != 2 || plan.Actions[0].Key != a || plan.Actions[1].Key != b || plan.TakesBytes != 72<<10 || plan.FreesBytes != 72<<10 {
			t.Errorf("the plan is %+v", plan)
		}
		if path := plan.Actions[0].Path; path != p.Template(a) {
			t.Errorf("the template is at %s, and not where the plugin has it, %s", path, p.Template(a))
		}
	}
	gc := []string{"gc", "--pool", n.Pool, "--kubelet-dir", n.Kubelet}
	if plan := jsonOf(t, append(gc, "--dry-run")...); len(plan.Actions) != 1 || plan.Actions[0].Path != p.Volume("notes") {
		t.Errorf("the plan is %+v", plan)
	}
	fails(t, gc, "another plugin works on this pool", "csi-disktemplate --endpoint "+n.Endpoint(), "--dry-run")
	if plan := jsonOf(t, clean...); len(plan.Actions) != 2 || plan.Actions[0].Result != "done" || plan.FreesBytes != 72<<10 {
		t.Errorf("the actions are %+v", plan)
	}
	if plan := jsonOf(t, clean...); len(plan.Actions) != 0 {
		t.Errorf("left are %+v", plan)
	}
	if loops := testenv.LoopsBelow(t, n.Pool); len(loops) != 1 || testenv.Mounts(t, n.Pool) != 0 {
		t.Errorf("the pool is on %v, with %d mounts here", loops, testenv.Mounts(t, n.Pool))
	}

	stop()
	testenv.NoLoopsBelow(t, n.Pool)
	if plan := jsonOf(t, gc...); len(plan.Actions) != 1 { // without a plugin: gc owns the pool
		t.Errorf("the actions are %+v", plan)
	}
	testenv.NoLoopsBelow(t, n.Pool)
	if testenv.Mounts(t, n.Pool) != 0 {
		t.Error("the pool stays mounted")
	}
}

// TestCommandsSayWhere runs a command that cannot open the pool. It says what to type instead.
func TestCommandsSayWhere(t *testing.T) {
	fs := testenv.Ext4.Mount(t, 600<<20)
	dir := filepath.Join(fs, "pool")
	open(t, pool.Config{Dir: dir, LoopbackSize: 400 << 20})
	testenv.Umount(t, filepath.Join(dir, "mnt"))
	binary := filepath.Join(testenv.Dir(t), "csi-disktemplate")
	testenv.Run(t, "cp", testenv.Binary(t), binary)
	if err := errors.Join(os.Chmod(filepath.Dir(binary), 0o755), os.Chmod(fs, 0o755)); err != nil {
		t.Fatal(err)
	}
	node, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	line := "kubectl -n csi-disktemplate exec $(kubectl -n csi-disktemplate get pods -o name -l app.kubernetes.io/component=plugin" +
		" --field-selector spec.nodeName=" + node + ") -c plugin -- csi-disktemplate clean-all --dry-run --output=json\n"
	for name, c := range map[string]struct {
		dir  string
		attr syscall.SysProcAttr
		says string
	}{
		"not root": {dir, syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}, "run this as root"},
		"root of a user namespace": {dir, syscall.SysProcAttr{
			Cloneflags:  syscall.CLONE_NEWUSER,
			UidMappings: []syscall.SysProcIDMap{{Size: 1}}, GidMappings: []syscall.SysProcIDMap{{Size: 1}},
		}, "not mounted here"},
		"no pool": {filepath.Join(fs, "other"), syscall.SysProcAttr{}, "there is no pool in"},
	} {
		t.Run(name, func(t *testing.T) {
			cmd := exec.CommandContext(t.Context(), binary, "clean-all", "--pool", c.dir, "--dry-run", "-o", "json")
			cmd.SysProcAttr = &c.attr
			code, out := testenv.Finish(t, cmd)
			if code != 1 || !strings.Contains(out, c.says) || !strings.Contains(out, c.dir) || !strings.HasSuffix(out, line) {
				t.Errorf("exit code %d, without %q or %q", code, c.says, line)
			}
		})
	}
	testenv.NoLoopsBelow(t, dir)
}
