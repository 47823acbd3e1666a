// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
)

// documented returns the first code block below a heading of a document.
func documented(t *testing.T, doc, heading string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("../..", doc))
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile("(?s)\n## " + heading + "\n.*?\n```\n(.*?)```\n").FindStringSubmatch(string(b))
	if m == nil {
		t.Fatalf("%s has no code below %q", doc, heading)
	}
	return m[1]
}

// bareMachine makes a script that runs another one as root of a machine whose root filesystem
// is in dir. The machine has the programs and the kernel of this one, and nothing in /var.
func bareMachine(t *testing.T, dir, script string) *exec.Cmd {
	t.Helper()
	bin := filepath.Join(dir, "opt/bin")
	for _, d := range []string{"usr", "etc", "boot", "proc", "sys", "dev", "tmp", "root", "var/lib", "opt/bin"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, link := range []string{"bin", "sbin", "lib", "lib64"} {
		to, err := os.Readlink("/" + link)
		if err == nil {
			err = os.Symlink(to, filepath.Join(dir, link))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	testenv.Run(t, "cp", testenv.Binary(t), filepath.Join(bin, "csi-disktemplate"))
	if err := os.WriteFile(filepath.Join(bin, "run"), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "sh", "-c",
		testenv.DropOthers(dir)+`set -e; cd "$0"; for d in usr etc boot sys dev; do mount --rbind /$d $d; done; mount -t proc proc proc; exec chroot . sh -e /opt/bin/run`, dir)
	cmd.Env = []string{"PATH=/opt/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root"}
	return cmd
}

// TestRunIt types the commands of the documents on a bare machine, and sees the plugin serve.
func TestRunIt(t *testing.T) {
	ofDoc := documented(t, "docs/operating.md", "Run it")
	ofHelp := "mkdir -p /var/lib/kubelet\n" + strings.Split(newCommand().Example, "\n")[0] + "\n"
	for _, c := range []struct {
		name, script string
		kind         testenv.Kind
	}{{"operating.md on ext4", ofDoc, testenv.Ext4}, {"operating.md on xfs", ofDoc, testenv.XFS}, {"help on ext4", ofHelp, testenv.Ext4}} {
		t.Run(c.name, func(t *testing.T) {
			dir := c.kind.Mount(t, 25<<30) // sparse
			log, err := os.Create(filepath.Join(t.TempDir(), "log"))
			if err != nil {
				t.Fatal(err)
			}
			defer log.Close()
			cmd := bareMachine(t, dir, c.script)
			cmd.Stdout, cmd.Stderr = log, log
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeoutCause(t.Context(), time.Minute, errors.New("the plugin does not serve"))
			ended := make(chan struct{})
			go func() {
				cmd.Wait()
				close(ended)
				cancel()
			}()
			defer func() {
				cmd.Process.Kill()
				<-ended
				testenv.NoLoopsBelow(t, dir)
			}()
			serves(ctx, t, filepath.Join(dir, "csi/csi.sock"))
			b, err := os.ReadFile(log.Name())
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("%s\n%s", c.script, b)
			first, _, _ := strings.Cut(string(b), "\n")
			if want := fmt.Sprintf("version=%q", versionName()); !strings.Contains(first, want) {
				t.Errorf("the first line of the log has no %s: %s", want, first)
			}
		})
	}
}

// serves asks a plugin for its name and version, and whether it is ready.
func serves(ctx context.Context, t *testing.T, socket string) {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	c := csi.NewIdentityClient(conn)
	info, err := c.GetPluginInfo(ctx, &csi.GetPluginInfoRequest{}, grpc.WaitForReady(true))
	if err != nil {
		t.Errorf("%v (%v)", err, context.Cause(ctx))
		return
	}
	if info.GetName() != "csi.disktemplate.io" || info.GetVendorVersion() != versionName() {
		t.Errorf("the plugin is %v, not of version %s", info, versionName())
	}
	if _, err := c.Probe(ctx, &csi.ProbeRequest{}); err != nil {
		t.Errorf("the plugin is not ready: %v", err)
	}
}
