// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/admin"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/driver"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/health"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/process"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
)

// running is a plugin that works on a pool of this machine.
type running struct {
	pid     int
	root    string // where its pool's files are: in a loopback pool this is not --pool
	options pluginOptions
}

// findRunning returns the plugin of the pool in dir, or if dir is "" the one there is, or of several the one of the
// default pool. It returns nil if there is none.
//
// A plugin is a process that has the file open by whose lock it owns its pool. Its command line says the rest. In a
// container these are the container's processes.
func findRunning(dir string) (*running, error) {
	holders, err := process.HoldingNamed(pool.OwnerLock)
	if err != nil {
		return nil, err
	}
	var found []*running
	for _, h := range holders {
		if r := readRunning(h.PID); r != nil {
			r.root = rootOf(h)
			found = append(found, r)
		}
	}
	if dir == "" && len(found) == 1 {
		return found[0], nil
	}
	var dirs []string
	for _, r := range found {
		if samePath(r.options.pool.Dir, dir) || dir == "" && samePath(r.options.pool.Dir, defaultPool) {
			return r, nil
		}
		dirs = append(dirs, r.options.pool.Dir)
	}
	if dir == "" && len(found) > 1 {
		return nil, fmt.Errorf("%d plugins run on this machine; give --pool one of %s", len(found), strings.Join(dirs, ", "))
	}
	return nil, nil
}

// rootOf is the root of the pool whose lock a process holds, by way of the process's own mount namespace (proc(5),
// /proc/pid/root).
func rootOf(h process.Process) string {
	return filepath.Join("/proc", strconv.Itoa(h.PID), "root", strings.TrimSuffix(h.File, pool.OwnerLock))
}

func samePath(a, b string) bool {
	a, errA := filepath.Abs(a)
	b, errB := filepath.Abs(b)
	return errA == nil && errB == nil && a == b
}

// inherited are the variables that decide what a plugin finds, and what its flags are by default.
var inherited = []string{"PATH", "KUBELET_DIR", "CSI_ENDPOINT", "NODE_NAME", "POD_NAME", "POD_NAMESPACE"}

// readRunning reads the flags of a plugin as it read them itself. It returns nil for a process that is none, as a
// command that works on the pool.
func readRunning(pid int) *running {
	args := process.Arguments(pid)
	if len(args) < 2 || !strings.HasPrefix(args[1], "-") {
		return nil
	}
	for _, name := range inherited {
		if value := process.Variable(pid, name); value != "" {
			defer os.Setenv(name, os.Getenv(name))
			os.Setenv(name, value)
		}
	}
	r := &running{pid: pid}
	f := pflag.NewFlagSet("plugin", pflag.ContinueOnError)
	f.ParseErrorsAllowlist.UnknownFlags = true // of another version
	r.options.add(f)
	addLogFlags(f)
	if err := f.Parse(args[1:]); err != nil {
		return nil
	}
	return r
}

// assume makes this process look at the node as the plugin does.
func (r *running) assume() {
	for _, name := range inherited {
		if value := process.Variable(r.pid, name); value != "" {
			os.Setenv(name, value)
		}
	}
}

// answerTime is how long a plugin may take to say how it is. Trials of a disk under load take a second.
const answerTime = 10 * time.Second

// findings asks the plugin how well it is: on its admin socket, or on its HTTP endpoint where the pool is full or gone
// and has no socket. It returns nil if the plugin has neither.
func (r *running) findings(ctx context.Context) ([]health.Finding, error) {
	ctx, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	c, err := admin.Dial(ctx, r.root)
	if err != nil {
		return r.readyz(ctx)
	}
	defer c.Close()
	return c.Node(ctx).Findings()
}

// readyz asks the plugin's HTTP endpoint, if it serves one.
func (r *running) readyz(ctx context.Context) ([]health.Finding, error) {
	if r.options.httpEndpoint == "" {
		return nil, nil
	}
	host, port, err := net.SplitHostPort(r.options.httpEndpoint)
	if err != nil {
		return nil, err
	}
	url := "http://" + net.JoinHostPort(cmp.Or(host, "localhost"), port) + "/readyz?verbose&output=json"
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}} // no proxy of the environment
	answer, err := client.Do(request)
	if err != nil {
		return nil, err
	}
	defer answer.Body.Close()
	var f driver.Findings
	if err := json.NewDecoder(answer.Body).Decode(&f); err != nil {
		return nil, fmt.Errorf("%s: its answer cannot be read (%w); is it of an older version?", request.URL, err)
	}
	return f.Findings, nil
}
