// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Command csi-disktemplate is the CSI node plugin, the operator's tool, and /init of the
// formatting VM. By the name kubectl-disktemplate it is a plugin of kubectl.
package main

import (
	"context"
	"fmt"
	"log"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"k8s.io/klog/v2"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/vmformat/guest"
)

// klogWriter writes the lines of package log to klog.
type klogWriter struct{}

func (klogWriter) Write(b []byte) (int, error) {
	klog.V(4).Info(strings.TrimSpace(string(b)))
	return len(b), nil
}

func main() {
	if guest.IsInit() {
		guest.Main()
	}
	// Some libraries print through package log: klog shows that from level 4 on.
	log.SetFlags(0)
	log.SetOutput(klogWriter{})
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	cmd := commandNamed(os.Args[0])
	if err := cmd.ExecuteContext(ctx); err != nil {
		code, print := exitCode(err)
		if print {
			fmt.Fprintln(os.Stderr, printableLines(fmt.Sprintf("%s: %v", cmd.DisplayName(), err)))
		}
		os.Exit(code)
	}
}
