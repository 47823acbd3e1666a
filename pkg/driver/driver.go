// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package driver

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/klog/v2"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume"
)

const (
	// DefaultName is the driver's name, as in CSIDriver and in pods.
	DefaultName = "csi.disktemplate.io"
	// TopologyKey is the topology segment that names the node of a volume.
	TopologyKey = "topology.csi.disktemplate.io/node"

	// drainTimeout is what calls under way get to finish after SIGTERM: less
	// than the 30 s after which Kubernetes kills a container.
	drainTimeout = 25 * time.Second

	// maxMessage bounds what a request may make the plugin hold in memory, in bytes.
	// CSI 1.13, "Size Limits", has 4 KiB for a map and 128 bytes for most strings, of
	// which no request has more than a handful: 256 KiB is ten times what one may have.
	// Kubelet does not hold a pod's volumeAttributes to that, and gRPC takes 4 MiB. What
	// is larger is RESOURCE_EXHAUSTED, from gRPC itself.
	maxMessage = 256 << 10
)

// Config is what a Driver serves. All of it is required but MaxVolumes,
// SharedResizer, SweepInterval and Registration.
type Config struct {
	Endpoint string // unix:// and an absolute path
	Name     string
	Version  string
	NodeID   string
	Volumes  *volume.Manager
	// MaxVolumes is how many claims the node can have staged; 0 leaves that to the
	// container orchestrator.
	MaxVolumes int64
	// SharedResizer is for a cluster whose one external-resizer asks this node's
	// controller service about the volumes of all nodes: one that is not here is left to
	// its own node's NodeExpandVolume, and is not NOT_FOUND.
	SharedResizer bool
	// Health tells what is missing for the plugin to do its work, or nil.
	Health  func() error
	Metrics *Metrics
	// SweepInterval is the time between sweeps of what was left behind, after the one
	// at the start; 0 is no sweeps at all.
	SweepInterval time.Duration
	// Registration tells kubelet of the driver once it serves; nil leaves that to a
	// node-driver-registrar.
	Registration *Registration
}

// Validate checks the texts.
func (c Config) Validate() error {
	switch {
	case c.NodeID == "":
		return errors.New("--node-id must not be empty; in a DaemonSet set NODE_NAME from spec.nodeName")
	case len(validation.IsValidLabelValue(c.NodeID)) > 0: // it is the topology segment, and so a label of the node
		return fmt.Errorf("--node-id %q: %s", c.NodeID, strings.Join(validation.IsValidLabelValue(c.NodeID), "; "))
	case c.SweepInterval < 0:
		return fmt.Errorf("--sweep-interval %s: must not be negative; 0 is no sweeps", c.SweepInterval)
	case c.MaxVolumes < 0:
		return fmt.Errorf("--max-volumes-per-node %d: must not be negative; 0 is no limit", c.MaxVolumes)
	case len(c.Name) > 63 || len(validation.IsDNS1123Subdomain(c.Name)) > 0: // CSI 1.13, GetPluginInfoResponse.name
		return fmt.Errorf("--driver-name %q must be a domain name of at most 63 characters, as %s", c.Name, DefaultName)
	}
	if _, err := socketPath(c.Endpoint); err != nil {
		return fmt.Errorf("--endpoint %q: %w", c.Endpoint, err)
	}
	return nil
}

// Serve answers CSI calls until ctx ends, then lets the calls under way finish.
func Serve(ctx context.Context, c Config) error {
	if err := c.Validate(); err != nil {
		return err
	}
	if c.Registration != nil {
		if err := c.Registration.makeDir(); err != nil {
			return err
		}
	}
	if c.SweepInterval > 0 {
		c.sweep(ctx, volume.Sweep{First: true})
	}
	l, err := listen(c.Endpoint)
	if err != nil {
		return fmt.Errorf("--endpoint %q: %w", c.Endpoint, err)
	}
	// Should draining take too long, a call still gets to clean up after itself.
	server := grpc.NewServer(grpc.UnaryInterceptor(c.Metrics.intercept), grpc.WaitForHandlers(true), grpc.MaxRecvMsgSize(maxMessage))
	csi.RegisterIdentityServer(server, &identityServer{cfg: c})
	busy := &inflight{}
	csi.RegisterControllerServer(server, &controllerServer{cfg: c, busy: busy})
	csi.RegisterNodeServer(server, &nodeServer{cfg: c, busy: busy})

	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		<-ctx.Done()
		drain(server)
		return nil
	})
	g.Go(func() error {
		klog.InfoS("Serving CSI", "endpoint", c.Endpoint, "driver", c.Name, "node", c.NodeID, "version", c.Version)
		return server.Serve(l)
	})
	if c.Registration != nil {
		g.Go(func() error { return c.Registration.serve(ctx) })
	}
	if c.SweepInterval > 0 {
		g.Go(func() error {
			c.sweepEvery(ctx, volume.Sweep{Hold: busy.start})
			return nil
		})
	}
	return g.Wait()
}

// sweepEvery sweeps until ctx ends.
func (c Config) sweepEvery(ctx context.Context, s volume.Sweep) {
	tick := time.NewTicker(c.SweepInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			c.sweep(ctx, s)
		}
	}
}

// sweep takes away what was left behind. That it cannot keeps nobody from being served.
func (c Config) sweep(ctx context.Context, s volume.Sweep) {
	actions, err := c.Volumes.Sweep(ctx, s)
	if err != nil && ctx.Err() == nil {
		klog.ErrorS(err, "No sweep; the next will look again")
	}
	for _, a := range actions {
		c.Metrics.swept(a)
	}
}

// drain stops accepting calls and waits for those under way, but not for ever.
func drain(server *grpc.Server) {
	done := make(chan struct{})
	go func() {
		server.GracefulStop()
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(drainTimeout):
		klog.InfoS("Ending calls that did not finish in time", "timeout", drainTimeout)
		server.Stop()
		<-done
	}
}

// maxSocketPath is the size of sun_path in unix(7), less the final NUL.
const maxSocketPath = 107

// socketPath returns the path in an endpoint.
func socketPath(endpoint string) (string, error) {
	path, ok := strings.CutPrefix(endpoint, "unix://")
	if !ok {
		path, ok = strings.CutPrefix(endpoint, "unix:")
	}
	if !ok || !strings.HasPrefix(path, "/") {
		return "", errors.New("must be unix:// and an absolute path, as unix:///csi/csi.sock")
	}
	if len(path) > maxSocketPath {
		return "", fmt.Errorf("its path has %d bytes, a socket's may have %d", len(path), maxSocketPath)
	}
	return path, nil
}

// listen opens a unix socket that only root can connect to. What a dead plugin
// left there is replaced, what a living one serves is not.
func listen(endpoint string) (net.Listener, error) {
	path, err := socketPath(endpoint)
	if err != nil {
		return nil, err
	}
	fi, err := os.Lstat(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
	case err != nil:
		return nil, err
	case fi.Mode().Type() != os.ModeSocket:
		return nil, fmt.Errorf("%s is not a socket (%s); move it away", path, fi.Mode().Type())
	default:
		conn, err := net.DialTimeout("unix", path, time.Second)
		if err == nil {
			conn.Close()
			return nil, errors.New("another process serves there; stop it first")
		}
		// Only this says that nobody listens; a busy listener says EAGAIN.
		if !errors.Is(err, syscall.ECONNREFUSED) {
			return nil, fmt.Errorf("another process may serve there: %w", err)
		}
		if err := os.Remove(path); err != nil {
			return nil, err
		}
	}
	old := syscall.Umask(0o177)
	defer syscall.Umask(old)
	return net.Listen("unix", path)
}
