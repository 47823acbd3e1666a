// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/process"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
)

const (
	// defaultPool is the pool's directory in the manifests.
	defaultPool = "/var/lib/csi-disktemplate"
	// restarted is the environment variable that tells a command that it was restarted in a
	// mount namespace of its own, and must not be again.
	restarted = "CSI_DISKTEMPLATE_RESTARTED"
)

// openExisting opens the plugin's pool for a command.
//
// A plugin in a container has its loopback pool in the container's mount namespace. So the
// command may find the pool's image, and no mount of it. Then it mounts the pool in a mount
// namespace of its own, and starts again there: usually the pool has the plugin's path then, so that
// the command sees the same paths as the plugin.
func openExisting(cmd *cobra.Command, dir string) (*pool.Pool, error) {
	return openExistingAs(cmd, pool.Config{Dir: dir})
}

func openExistingAs(cmd *cobra.Command, c pool.Config) (*pool.Pool, error) {
	p, err := pool.OpenExistingAs(c)
	if errors.Is(err, pool.ErrNotMounted) && os.Getenv(restarted) == "" {
		err = fmt.Errorf("%w (%w)", err, restartWithPool(cmd.Context(), c.Dir))
	}
	if err != nil {
		node, _ := os.Hostname()
		return nil, fmt.Errorf("%w; if the plugin runs in Kubernetes, type: %s", err, inPod(cmd, node))
	}
	return p, nil
}

// restartWithPool returns only if it fails.
func restartWithPool(ctx context.Context, dir string) error {
	runtime.LockOSThread() // never unlocked: the process goes on as this thread, or ends with an error
	if err := pool.MountForThread(ctx, dir); err != nil {
		return err
	}
	if err := os.Setenv(restarted, "1"); err != nil {
		return err
	}
	return process.Restart()
}

// inPod is the line that runs a command in the plugin's pod on a node, with the flags and arguments
// that the user gave. The directories are left out: the pod has its own.
func inPod(cmd *cobra.Command, node string) string {
	const namespace = "csi-disktemplate"
	line := []string{
		"kubectl -n " + namespace + " exec $(kubectl -n " + namespace + " get pods -o name -l app.kubernetes.io/component=plugin --field-selector spec.nodeName=" + node + ")",
		"-c plugin --", cmd.CommandPath(),
	}
	cmd.Flags().Visit(func(f *pflag.Flag) {
		switch {
		case f.Name == "pool", f.Name == "kubelet-dir":
		case f.Value.String() == f.NoOptDefVal: // --dry-run
			line = append(line, "--"+f.Name)
		default:
			line = append(line, "--"+f.Name+"="+f.Value.String())
		}
	})
	return strings.Join(append(line, cmd.Flags().Args()...), " ")
}

// cleanAllLine is how somebody who reads a message of the plugin runs clean-all on its pool. A
// plugin in a pod knows the pod's name from its manifest.
func cleanAllLine(namespace, pod, dir string) string {
	line := "csi-disktemplate clean-all"
	if abs, err := filepath.Abs(dir); err == nil && abs != defaultPool {
		line += " --pool " + abs
	}
	if namespace == "" || pod == "" {
		return line
	}
	return "kubectl -n " + namespace + " exec " + pod + " -c plugin -- " + line
}
