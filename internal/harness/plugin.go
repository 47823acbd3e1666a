// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"syscall"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Command is how a plugin is started.
type Command struct {
	Binary string
	Within []string // a command that ends by executing its arguments, which are the plugin's command line; default: none
	ID     string   // --node-id
	Flags  []string // further flags
	Env    []string // added to the environment
	LogDir string   // where the log is; default: os.TempDir()
	// Deathsig, if it is not 0, is sent to the plugin when the thread ends that started it: PR_SET_PDEATHSIG(2const).
	Deathsig syscall.Signal
}

// Plugin is a process of the plugin.
type Plugin struct {
	Log    string // the path of what it prints
	cmd    *exec.Cmd
	exited chan struct{}
}

// Start starts a plugin on the node, as a DaemonSet does. It does not wait until the plugin serves.
func (n Node) Start(c Command) (*Plugin, error) {
	log, err := os.CreateTemp(c.LogDir, "csi-disktemplate-*.log")
	if err != nil {
		return nil, err
	}
	defer log.Close()
	line := append(slices.Clone(c.Within), c.Binary,
		"--endpoint", n.Endpoint(), "--node-id", c.ID, "--pool", n.Pool, "--kubelet-dir", n.Kubelet,
		"--node-headroom", "0", // no kubelet evicts pods here, and the disk may be nearly full
	)
	line = append(line, c.Flags...)
	cmd := exec.Command(line[0], line[1:]...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Env = append(os.Environ(), c.Env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Pdeathsig: c.Deathsig,
		Setpgid:   true, // Ctrl-C is for whoever started it, who then ends the plugin in order
	}
	if err := cmd.Start(); err != nil {
		return nil, errors.Join(fmt.Errorf("starting the plugin: %w", err), os.Remove(log.Name()))
	}
	p := &Plugin{Log: log.Name(), cmd: cmd, exited: make(chan struct{})}
	go func() {
		cmd.Wait() // the process's state says the same
		close(p.exited)
	}()
	return p, nil
}

// PID is the process's id.
func (p *Plugin) PID() int { return p.cmd.Process.Pid }

// Exited is closed when the process has ended.
func (p *Plugin) Exited() <-chan struct{} { return p.exited }

// Alive reports whether the process has not ended.
func (p *Plugin) Alive() bool {
	select {
	case <-p.exited:
		return false
	default:
		return true
	}
}

// State waits until the process has ended, and returns how.
func (p *Plugin) State() *os.ProcessState {
	<-p.exited
	return p.cmd.ProcessState
}

// Signal sends a signal to the process. It may have ended already.
func (p *Plugin) Signal(s os.Signal) error {
	if err := p.cmd.Process.Signal(s); !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	return nil
}

// Kill ends the process by SIGKILL, unless it has ended already, and returns how it ended.
func (p *Plugin) Kill() *os.ProcessState {
	p.cmd.Process.Kill()
	return p.State()
}

// Stop ends the process by SIGTERM, as Kubernetes does, and by SIGKILL if that takes longer than the given time. An exit
// code other than 0 is an error.
func (p *Plugin) Stop(within time.Duration) error {
	if err := p.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	select {
	case <-p.exited:
	case <-time.After(within):
		p.Kill()
		return fmt.Errorf("the plugin did not end within %s of SIGTERM", within)
	}
	if !p.State().Success() {
		return fmt.Errorf("the plugin ended with %s", p.State())
	}
	return nil
}

// Serves waits until the plugin answers calls. It returns an error if the plugin ends before, or ctx does.
func (p *Plugin) Serves(ctx context.Context, c *Client) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		select {
		case <-p.exited:
			cancel()
		case <-ctx.Done():
		}
	}()
	for {
		_, err := c.GetPluginInfo(ctx, &csi.GetPluginInfoRequest{}, grpc.WaitForReady(true))
		switch {
		case err == nil:
			return nil
		case !p.Alive():
			return fmt.Errorf("the plugin ended before it served: %s", p.State())
		case status.Code(err) != codes.Unavailable: // Unavailable: the connection to an earlier plugin broke
			return fmt.Errorf("the plugin does not serve: %w", err)
		}
	}
}

// Tail is the end of the log.
func (p *Plugin) Tail() string {
	b, err := os.ReadFile(p.Log)
	if err != nil {
		return err.Error()
	}
	return string(b[max(0, len(b)-8000):])
}
