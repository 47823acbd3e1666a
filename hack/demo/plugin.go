// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
)

const (
	// readyTimeout is what the plugin gets to make a pool and to unpack a kernel.
	readyTimeout = time.Minute
	// stopTimeout is Kubernetes' default terminationGracePeriodSeconds.
	stopTimeout = 30 * time.Second
)

// process is the running plugin.
type process struct {
	cmd    *exec.Cmd
	log    *os.File
	exited chan struct{} // closed when it has exited; cmd.ProcessState is set then
	conn   *grpc.ClientConn

	node       csi.NodeClient
	controller csi.ControllerClient
}

// startPlugin starts the plugin as a DaemonSet would.
func startPlugin(binary, dir string) (*process, error) {
	socket := filepath.Join(kubeletDir, "plugins", "csi.disktemplate.io", "csi.sock") // where kubelet has them
	if err := os.MkdirAll(filepath.Dir(socket), 0o750); err != nil {
		return nil, err
	}
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, err
	}
	log, err := os.CreateTemp("", "csi-disktemplate-demo-*.log")
	if err != nil {
		return nil, err
	}
	p := &process{log: log, exited: make(chan struct{}), conn: conn, node: csi.NewNodeClient(conn), controller: csi.NewControllerClient(conn)}
	p.cmd = exec.Command(binary, "--endpoint", "unix://"+socket, "--node-id", "demo", "--kubelet-dir", kubeletDir,
		"--pool", dir, "--loopback-pool-size", poolSize)
	p.cmd.Stdout, p.cmd.Stderr = log, log
	p.cmd.SysProcAttr = &syscall.SysProcAttr{
		Pdeathsig: syscall.SIGTERM, // if the demo is killed
		Setpgid:   true,            // Ctrl-C is for the demo, which ends the plugin in order
	}
	if err := p.cmd.Start(); err != nil {
		return nil, errors.Join(fmt.Errorf("starting the plugin: %w", err), conn.Close(), log.Close(), os.Remove(log.Name()))
	}
	go func() {
		p.cmd.Wait() // the state tells the same
		close(p.exited)
	}()
	return p, nil
}

// ready waits until the plugin says that its pool and formatter can be used.
func (p *process) ready(ctx context.Context) (*csi.GetPluginInfoResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	identity := csi.NewIdentityClient(p.conn)
	for {
		_, err := identity.Probe(ctx, &csi.ProbeRequest{})
		switch {
		case err == nil:
			return identity.GetPluginInfo(ctx, &csi.GetPluginInfoRequest{})
		case ctx.Err() != nil:
			return nil, fmt.Errorf("the plugin was not ready within %s: %w", readyTimeout, err)
		case status.Code(err) != codes.Unavailable: // Unavailable: no socket yet
			return nil, fmt.Errorf("the plugin is not ready: %w", err)
		}
		select {
		case <-p.exited:
			return nil, fmt.Errorf("the plugin ended at once: %s", p.cmd.ProcessState)
		case <-time.After(50 * time.Millisecond):
			p.conn.ResetConnectBackoff()
		}
	}
}

func (p *process) alive() bool {
	select {
	case <-p.exited:
		return false
	default:
		return true
	}
}

// stop ends the plugin if it runs. An exit code other than 0 is an error.
func (p *process) stop() error {
	defer p.conn.Close()
	if p.alive() {
		if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
			return err
		}
	}
	select {
	case <-p.exited:
	case <-time.After(stopTimeout):
		err := p.cmd.Process.Kill()
		<-p.exited
		return errors.Join(fmt.Errorf("the plugin did not end within %s of SIGTERM", stopTimeout), err)
	}
	if !p.cmd.ProcessState.Success() {
		return fmt.Errorf("the plugin ended with %s", p.cmd.ProcessState)
	}
	return nil
}

// showLog prints the end of the plugin's log and where the rest is.
func (p *process) showLog() {
	b, err := os.ReadFile(p.log.Name())
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return
	}
	lines := bytes.Split(bytes.TrimSpace(b), []byte("\n"))
	lines = lines[max(0, len(lines)-15):]
	fmt.Fprintf(os.Stderr, "\nThe end of the plugin's log; all of it is in %s:\n%s\n", p.log.Name(), bytes.Join(lines, []byte("\n")))
}
