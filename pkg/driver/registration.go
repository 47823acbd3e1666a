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

// NewRegistration prepares the registration of the driver in dir, which is kubelet's
// plugins_registry. Kubelet will call the driver at the path of the endpoint, so kubelet
// must see the socket at the same path as the plugin. An error is about dir, if the name
// and the endpoint are good.
func NewRegistration(dir, name, endpoint string) (*Registration, error) {
	if !filepath.IsAbs(dir) {
		return nil, errors.New("must be an absolute path, as /var/lib/kubelet/plugins_registry")
	}
	socket := filepath.Join(dir, name+"-reg.sock")
	if _, err := socketPath("unix://" + socket); err != nil {
		return nil, fmt.Errorf("cannot have the socket %s: %w", socket, err)
	}
	path, err := socketPath(endpoint)
	if err != nil {
		return nil, fmt.Errorf("endpoint %q: %w", endpoint, err)
	}
	return &Registration{
		socket: socket,
		info: &registration.PluginInfo{
			Type: registration.CSIPlugin, Name: name, Endpoint: path,
			SupportedVersions: []string{"1.0.0"}, // of CSI; kubelet looks only at the major version
		},
		status: errNotAsked,
	}, nil
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
		return fmt.Errorf("making the directory of the CSI socket (--endpoint): %w", err)
	}
	return nil
}

// serve answers kubelet until ctx ends. The socket goes with it, and tells kubelet
// that the driver is gone.
func (r *Registration) serve(ctx context.Context) error {
	l, err := listen("unix://" + r.socket)
	if err != nil {
		return fmt.Errorf("opening the socket %s for kubelet (--registration-dir): %w", r.socket, err)
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
