// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package driver

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/health"
)

// neighbourPatience is how long a registrar may take to answer, which it does at once.
const neighbourPatience = time.Second

// NameRequirement is that nobody else has registered a driver of this name in kubelet's plugins_registry: kubelet would
// call the one that came last. endpoint is that of the own driver, which may not serve yet.
//
// The socket of a registration has the driver's name, in node-driver-registrar as in [Registration], and whoever listens
// there says where the driver is.
func NameRequirement(dir, name, endpoint string) health.Requirement {
	return health.Requirement{
		Name: "driver-name", Seldom: true,
		Look: func() []health.Condition { return neighbours(filepath.Join(dir, name+"-reg.sock"), name, endpoint) },
		Good: func() string { return fmt.Sprintf("no other driver is registered as %s in %s", name, dir) },
	}
}

func neighbours(socket, name, endpoint string) []health.Condition {
	at := registered(socket)
	own, err := socketPath(endpoint)
	if at == "" || err != nil {
		return nil
	}
	theirs, err := os.Stat(at)
	if err != nil {
		return nil // nobody serves there, or it is a path of the node alone
	}
	if ours, err := os.Stat(own); err == nil && os.SameFile(ours, theirs) {
		return nil
	}
	return []health.Condition{{
		Code: health.DriverNameTaken, Severity: health.Inaccessible,
		Text:   fmt.Sprintf("another driver is registered with kubelet as %s: it serves on %s, and this one on %s", name, at, own),
		Cost:   "kubelet calls one of them for the volumes of both",
		Remedy: "remove one of the two plugins from this node, or give this one a --driver-name of its own",
	}}
}

// registered asks who listens on a socket of kubelet's plugins_registry for the path of its driver. It returns "" if nobody
// answers.
func registered(socket string) string {
	if _, err := os.Stat(socket); err != nil {
		return ""
	}
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return ""
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), neighbourPatience)
	defer cancel()
	info, err := registration.NewRegistrationClient(conn).GetInfo(ctx, &registration.InfoRequest{})
	if err != nil {
		return ""
	}
	return info.GetEndpoint()
}
