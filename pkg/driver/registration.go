// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package driver

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"

	"google.golang.org/grpc"
	"k8s.io/klog/v2"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/health"
)

// Registration makes the driver known to kubelet, as node-driver-registrar does. Kubelet
// watches a directory for sockets, asks each of them which plugin it is, and reports
// whether it registered that plugin. A restarted kubelet asks again.
//
// Source: k8s.io/kubelet/pkg/apis/pluginregistration/v1.
type Registration struct {
	registration.UnimplementedRegistrationServer
	socket string // of the registration, not of CSI
	info   *registration.PluginInfo

	mu   sync.Mutex
	lack *health.Condition // nil once kubelet has registered the driver
}

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
		lack: notRegistered("kubelet has not asked yet", "check that kubelet runs, and that --registration-dir is its plugins_registry"),
	}, nil
}

func notRegistered(why, remedy string) *health.Condition {
	return &health.Condition{Code: health.NotRegistered, Severity: health.Inaccessible, Text: "the driver is not registered with kubelet: " + why, Remedy: remedy}
}

// Conditions returns why kubelet does not know the driver, or nothing if it does.
func (r *Registration) Conditions() []health.Condition {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.lack == nil {
		return nil
	}
	return []health.Condition{*r.lack}
}

// Requirement is that kubelet knows the driver.
func (r *Registration) Requirement() health.Requirement {
	return health.Requirement{Name: "registration", Look: r.Conditions, Good: func() string {
		return "kubelet has registered the driver " + r.info.Name
	}}
}

// serve answers kubelet until ctx ends. Then the socket is removed, which tells kubelet
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

// NotifyRegistrationStatus receives the result from kubelet, which retries by itself after
// an error.
func (r *Registration) NotifyRegistrationStatus(_ context.Context, s *registration.RegistrationStatus) (*registration.RegistrationStatusResponse, error) {
	var lack *health.Condition
	if s.PluginRegistered {
		klog.InfoS("Registered with kubelet", "driver", r.info.Name)
	} else {
		lack = notRegistered(fmt.Sprintf("kubelet says %q", s.Error), "kubelet will try again; its own log has more")
		klog.ErrorS(errors.New(lack.Message()), "Registering with kubelet", "driver", r.info.Name, "endpoint", r.info.Endpoint)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.lack = lack
	return &registration.RegistrationStatusResponse{}, nil
}
