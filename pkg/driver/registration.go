// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package driver

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"google.golang.org/grpc"
	"k8s.io/klog/v2"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"
)

// Registration makes the driver known to kubelet, as node-driver-registrar does:
// kubelet finds a socket in a directory that it watches, asks it who is there, and
// tells what came of it. When kubelet restarts it looks again.
//
// Source: k8s.io/kubelet/pkg/apis/pluginregistration/v1.
type Registration struct {
	registration.UnimplementedRegistrationServer
	socket string // of the registration, not of CSI
	info   *registration.PluginInfo

	mu     sync.Mutex
	status error // nil once kubelet has taken the driver
}

var errNotAsked = errors.New("kubelet has not asked yet; is it running, and is --registration-dir its plugins_registry?")

// NewRegistration prepares a registration in kubelet's plugins_registry directory.
// Kubelet will call the driver at the endpoint's path, so that is to be the same
// for kubelet as for the plugin.
func NewRegistration(dir string, c Config) (*Registration, error) {
	r := &Registration{
		socket: filepath.Join(dir, c.Name+"-reg.sock"),
		status: errNotAsked,
	}
	if !filepath.IsAbs(dir) {
		return nil, fmt.Errorf("--registration-dir %q: must be an absolute path, as /var/lib/kubelet/plugins_registry", dir)
	}
	if _, err := socketPath("unix://" + r.socket); err != nil {
		return nil, fmt.Errorf("--registration-dir %q: %w", dir, err)
	}
	path, err := socketPath(c.Endpoint)
	if err != nil {
		return nil, fmt.Errorf("--endpoint %q: %w", c.Endpoint, err)
	}
	r.info = &registration.PluginInfo{
		Type: registration.CSIPlugin, Name: c.Name, Endpoint: path,
		SupportedVersions: []string{"1.0.0"}, // of CSI; kubelet looks at the major version
	}
	return r, nil
}

// Check tells why kubelet does not know the driver, or is nil if it does.
func (r *Registration) Check() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.status != nil {
		return fmt.Errorf("not registered with kubelet: %w", r.status)
	}
	return nil
}

// makeDir makes the driver's directory among kubelet's plugins, which is nobody
// else's to make.
func (r *Registration) makeDir() error {
	if err := os.MkdirAll(filepath.Dir(r.info.Endpoint), 0o750); err != nil {
		return fmt.Errorf("--endpoint: %w", err)
	}
	return nil
}

// serve answers kubelet until ctx ends. The socket goes with it, and tells kubelet
// that the driver is gone.
func (r *Registration) serve(ctx context.Context) error {
	l, err := listen("unix://" + r.socket)
	if err != nil {
		return fmt.Errorf("--registration-dir: %s: %w", r.socket, err)
	}
	server := grpc.NewServer(grpc.MaxRecvMsgSize(maxMessage))
	registration.RegisterRegistrationServer(server, r)
	stop := context.AfterFunc(ctx, server.Stop)
	defer stop()
	klog.InfoS("Waiting for kubelet to register the driver", "socket", r.socket)
	return server.Serve(l)
}

// GetInfo tells kubelet where the driver is.
func (r *Registration) GetInfo(context.Context, *registration.InfoRequest) (*registration.PluginInfo, error) {
	return r.info, nil
}

// NotifyRegistrationStatus hears what came of it. Kubelet tries again by itself.
func (r *Registration) NotifyRegistrationStatus(_ context.Context, s *registration.RegistrationStatus) (*registration.RegistrationStatusResponse, error) {
	var status error
	if s.PluginRegistered {
		klog.InfoS("Registered with kubelet", "driver", r.info.Name)
	} else {
		status = fmt.Errorf("kubelet says %q, and will try again", s.Error)
		klog.ErrorS(status, "Registering with kubelet", "driver", r.info.Name, "endpoint", r.info.Endpoint)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.status = status
	return &registration.RegistrationStatusResponse{}, nil
}
