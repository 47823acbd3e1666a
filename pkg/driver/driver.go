// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package driver

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/klog/v2"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/health"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/logs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/sweep"
)

const (
	// DefaultName is the driver's name, as in CSIDriver and in pods.
	DefaultName = "csi.disktemplate.io"
	// TopologyKey is the topology segment that names the node of a volume.
	TopologyKey = "topology.csi.disktemplate.io/node"

	// drainTimeout is how long calls under way may take to finish after SIGTERM. It is
	// less than the 30 s after which Kubernetes kills a container.
	drainTimeout = 25 * time.Second

	// maxMessage is the largest request, in bytes: it bounds the memory that a request
	// takes. CSI 1.13, "Size Limits", allows 4 KiB for a map and 128 bytes for most
	// strings, and no request has more than a handful of these: 256 KiB is ten times that.
	// Kubelet does not enforce the limits on a pod's volumeAttributes, and gRPC accepts
	// 4 MiB by default. gRPC itself answers a larger request with RESOURCE_EXHAUSTED.
	maxMessage = 256 << 10

	// window is how much a client may send before the plugin has read it, in bytes. With a fixed
	// one gRPC does not measure the socket by a ping beside each call, for which both sides wake
	// once more.
	window = 4 * maxMessage
)

// Config is what [Serve] works with. Everything is required unless it says otherwise.
type Config struct {
	Endpoint string // unix:// and an absolute path, see [CheckEndpoint]
	Name     string // see [CheckName]
	Version  string
	NodeID   string // see [CheckNodeID]
	Volumes  *volume.Manager
	// MaxVolumes is how many claims the node can have staged. It is not negative; 0
	// leaves the number to the container orchestrator.
	MaxVolumes int64
	// SharedResizer is for a cluster with one external-resizer, which asks this node's
	// controller service about the volumes of all nodes. A volume that is not on this node
	// is then left to its own node's NodeExpandVolume and is not NOT_FOUND.
	SharedResizer bool
	// Health returns what is wrong with the pool and the formatter.
	Health  func() []health.Condition
	Metrics *Metrics
	// SweepInterval is the time between sweeps of what was left behind, after the one
	// at the start; 0 means no sweeps at all.
	SweepInterval time.Duration
	// TrimInterval is the time between looks for space that deleted files have left: see
	// [volume.Manager.Trim]. 0 means never.
	TrimInterval time.Duration
	// Registration tells kubelet about the driver once it serves; nil leaves that to a
	// node-driver-registrar.
	Registration *Registration
}

// validate checks the texts.
func (c Config) validate() error {
	for _, text := range []struct {
		what, text string
		check      func(string) error
	}{{"node id", c.NodeID, CheckNodeID}, {"driver name", c.Name, CheckName}, {"endpoint", c.Endpoint, CheckEndpoint}} {
		if err := text.check(text.text); err != nil {
			return fmt.Errorf("%s %q: %w", text.what, text.text, err)
		}
	}
	if c.MaxVolumes < 0 {
		return fmt.Errorf("at most %d volumes: must not be negative", c.MaxVolumes)
	}
	if c.SweepInterval < 0 || c.TrimInterval < 0 {
		return fmt.Errorf("sweep interval %s, trim interval %s: must not be negative", c.SweepInterval, c.TrimInterval)
	}
	return nil
}

// CheckNodeID checks the name of a node. It is the topology segment, and so the value of
// a label of the node.
func CheckNodeID(id string) error {
	if id == "" {
		return errors.New("must not be empty; in a DaemonSet, set NODE_NAME from spec.nodeName")
	}
	if len(validation.IsValidLabelValue(id)) > 0 {
		return errors.New("must have at most 63 letters, digits, dots, dashes and underscores, with a letter or digit at both ends, because it becomes the value of a label")
	}
	return nil
}

// CheckName checks the name of a driver: CSI 1.13, GetPluginInfoResponse.name.
func CheckName(name string) error {
	if len(name) > 63 || len(validation.IsDNS1123Subdomain(name)) > 0 {
		return errors.New("must be a domain name of at most 63 characters, as " + DefaultName)
	}
	return nil
}

// CheckEndpoint checks the text of an endpoint. It does not look at the path on the node.
func CheckEndpoint(endpoint string) error {
	_, err := socketPath(endpoint)
	return err
}

// Serve answers CSI calls until ctx ends, then lets the calls under way finish.
func Serve(ctx context.Context, c Config) error {
	if err := c.validate(); err != nil {
		return err
	}
	if err := makeSocketDir(c.Endpoint); err != nil {
		return fmt.Errorf("--endpoint %q: the socket's directory cannot be made: %w", c.Endpoint, err)
	}
	if c.SweepInterval > 0 {
		c.sweep(ctx, sweep.Options{First: true})
	}
	l, err := listen(c.Endpoint)
	if err != nil {
		return fmt.Errorf("--endpoint %q: %w", c.Endpoint, err)
	}
	// WaitForHandlers lets a call clean up after itself even when draining took too long.
	server := grpc.NewServer(grpc.UnaryInterceptor(c.Metrics.intercept), grpc.WaitForHandlers(true), grpc.MaxRecvMsgSize(maxMessage),
		grpc.StaticStreamWindowSize(window), grpc.StaticConnWindowSize(window))
	csi.RegisterIdentityServer(server, &identityServer{cfg: c})
	csi.RegisterControllerServer(server, &controllerServer{cfg: c})
	csi.RegisterNodeServer(server, &nodeServer{cfg: c})

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
	g.Go(func() error { return every(ctx, c.SweepInterval, func() { c.sweep(ctx, sweep.Options{}) }) })
	g.Go(func() error { return every(ctx, c.TrimInterval, func() { c.trim(ctx) }) })
	g.Go(func() error { return every(ctx, diskInterval, func() { c.checkDisks(ctx) }) })
	return g.Wait()
}

// every does something again and again until ctx ends. An interval of 0 means never.
func every(ctx context.Context, interval time.Duration, do func()) error {
	if interval == 0 {
		return nil
	}
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			do()
		}
	}
}

// trim returns the space of deleted files. An error does not stop the plugin from serving.
func (c Config) trim(ctx context.Context) {
	if err := c.Volumes.Trim(ctx); err != nil && ctx.Err() == nil {
		klog.ErrorS(err, "Space of deleted files was not returned; the plugin tries again", "interval", c.TrimInterval)
	}
}

// diskInterval is the time between two looks at the disk.img files of pods. A look takes 25 µs for each volume
// (-bench CheckDisks ./pkg/volume), and a fast disk takes some GiB in that time.
const diskInterval = 10 * time.Second

// checkDisks looks whether pods have made their disk.img larger. A pool that cannot be read is a
// condition of its own.
func (c Config) checkDisks(ctx context.Context) {
	if err := c.Volumes.CheckDisks(ctx); err != nil && ctx.Err() == nil {
		klog.V(4).InfoS("The disk images were not looked at; the plugin tries again", "err", err)
	}
}

// sweep removes what was left behind. An error does not stop the plugin from serving.
func (c Config) sweep(ctx context.Context, o sweep.Options) {
	start := time.Now()
	actions, err := c.Volumes.Sweep(ctx, o)
	switch {
	case errors.Is(err, pool.ErrUnusable): // a condition, which was logged when it began
		logs.Warn("The sweep failed; the next one tries again", "err", err)
	case err != nil && ctx.Err() == nil:
		klog.ErrorS(err, "The sweep failed; the next one tries again")
	}
	klog.V(2).InfoS("Swept", "found", len(actions), "duration", time.Since(start))
	c.Metrics.sweeps.swept(actions, err)
}

// drain stops accepting calls and waits up to drainTimeout for those under way.
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
		return "", fmt.Errorf("the path of a unix socket may have %d bytes, this one has %d", maxSocketPath, len(path))
	}
	return path, nil
}

// makeSocketDir makes the directory of the CSI socket. Nobody else makes the driver's directory
// among kubelet's plugins, or one on a machine without kubelet.
func makeSocketDir(endpoint string) error {
	path, err := socketPath(endpoint)
	if err != nil {
		return err
	}
	return os.MkdirAll(filepath.Dir(path), 0o750)
}

// listen opens a unix socket that only root can connect to. It replaces the socket of a
// dead plugin, but not one that a living process serves, and no other kind of file.
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
		return nil, fmt.Errorf("%s is not a socket; move it away", path)
	default:
		conn, err := net.DialTimeout("unix", path, time.Second)
		if err == nil {
			conn.Close()
			return nil, errors.New("another process serves there; stop it first")
		}
		// Only ECONNREFUSED proves that nobody listens: a busy listener returns EAGAIN.
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
