// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package driver

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/csi-disktemplate/csi-disktemplate/internal/harness"
	"github.com/csi-disktemplate/csi-disktemplate/internal/harness/harnesstest"
	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
)

// patience is for everything that takes a VM, on a machine that runs other tests as well.
const patience = 90 * time.Second

// node is a node of a test.
type node struct {
	harness.Node
	t *testing.T
}

// newNode makes a node with a pool of the given kind. The test must leave it without volumes, loop devices and mounts.
func newNode(t *testing.T, kind testenv.Kind, size int64) *node {
	t.Helper()
	n := &node{harnesstest.New(t, filepath.Join(kind.Mount(t, size), "pool")), t}
	t.Cleanup(func() {
		t.Helper()
		n.mustHave("none")
	})
	return n
}

// with is the same node for a subtest.
func (n *node) with(t *testing.T) *node { return &node{n.Node, t} }

// volumes lists what there is of volumes: images, loop devices, mounts.
func (n *node) volumes() string {
	n.t.Helper()
	if found := n.find().List(); len(found) > 0 {
		return strings.Join(found, " ")
	}
	return "none"
}

// mustKeep runs a function that must leave the volumes as they are.
func (n *node) mustKeep(f func()) {
	n.t.Helper()
	before := n.volumes()
	f()
	n.mustHave(before)
}

// mustHave compares the volumes with what there should be.
func (n *node) mustHave(want string) {
	n.t.Helper()
	if got := harnesstest.Settles(n.volumes, want); got != want {
		n.t.Errorf("there is %s\nexpected %s", got, want)
	}
}

// find finds what there is of volumes.
func (n *node) find() harness.Found {
	n.t.Helper()
	found, err := n.Find()
	if err != nil {
		n.t.Fatal(err)
	}
	return found
}

// mounts lists the mounts below kubelet's directory.
func (n *node) mounts() []string {
	n.t.Helper()
	mounts, err := harness.Mounts(n.Kubelet)
	if err != nil {
		n.t.Fatal(err)
	}
	return mounts
}

// files lists every file in the pool.
func (n *node) files() []string {
	n.t.Helper()
	var found []string
	err := filepath.WalkDir(n.Pool, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			found = append(found, strings.TrimPrefix(path, n.Pool+"/"))
		}
		return err
	})
	if err != nil {
		n.t.Fatal(err)
	}
	return found
}

func uidOf(id string) string { return "uid-of-" + id }

// target is a target path as kubelet makes it, with its parent.
func (n *node) target(id string) string {
	n.t.Helper()
	v := harness.Volume{Target: n.Target(uidOf(id), "scratch")}
	if err := v.MakeDirs(); err != nil {
		n.t.Fatal(err)
	}
	return v.Target
}

// request is the request that kubelet sends to publish an inline volume.
func (n *node) request(id, fsType string, attributes ...string) *csi.NodePublishVolumeRequest {
	n.t.Helper()
	v := n.Inline(id, fsType, harness.Pod{Namespace: "shop", Name: "pod-of-" + id, UID: uidOf(id)}, pairs(attributes))
	if err := v.MakeDirs(); err != nil {
		n.t.Fatal(err)
	}
	return v.PublishRequest()
}

// plugin is the product, running.
type plugin struct {
	*node
	*harness.Plugin
	*harness.Client
	log logbook
	web string // its HTTP endpoint
}

// start starts the plugin on the node, and waits until it serves. It is killed when the test ends.
func (n *node) start(flags ...string) *plugin {
	n.t.Helper()
	return n.startWithin(nil, flags...)
}

// startWithin is start by a command that executes the plugin.
func (n *node) startWithin(within []string, flags ...string) *plugin {
	n.t.Helper()
	p := &plugin{node: n, Client: harnesstest.Connect(n.t, n.Node)}
	p.Plugin = harnesstest.Launch(n.t, n.Node, harness.Command{
		Binary: testenv.Binary(n.t), ID: "node-of-test", Within: within,
		Flags: append([]string{"--http-endpoint", "127.0.0.1:0", "--accel", "tcg", "-v", "5"}, flags...),
	})
	p.log = logbook{n.t, p.Log}
	n.t.Cleanup(func() {
		p.Kill()
		if n.t.Failed() {
			n.t.Logf("the log of the plugin with the pid %d:\n%s", p.PID(), p.log.loud())
		}
	})
	ctx, cancel := context.WithTimeout(n.t.Context(), patience)
	defer cancel()
	if err := p.Serves(ctx, p.Client); err != nil {
		n.t.Fatalf("%v\n%s", err, p.log)
	}
	m := regexp.MustCompile(`"Serving health and metrics" address="([^"]+)"`).FindStringSubmatch(p.log.String())
	if m == nil {
		n.t.Fatalf("no HTTP endpoint in\n%s", p.log)
	}
	p.web = m[1]
	return p
}

// with is the same plugin for a subtest.
func (p *plugin) with(t *testing.T) *plugin {
	q := *p
	q.node, q.log.t = p.node.with(t), t
	return &q
}

// ends waits until the plugin has ended all that was deleted.
func (p *plugin) ends() {
	p.t.Helper()
	p.await("deleted volumes to end", func() bool { return p.metric("csi_disktemplate_volumes_ending") == 0 })
}

// mustKeep is the node's, and begins when all that was deleted has ended: it is among the volumes until then.
func (p *plugin) mustKeep(f func()) {
	p.t.Helper()
	p.ends()
	p.node.mustKeep(f)
}

// await waits until something is so. The plugin must live.
func (p *plugin) await(what string, ok func() bool) {
	p.t.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(2 * time.Millisecond) {
		select {
		case <-p.Exited():
			p.t.Fatalf("%s: the plugin ended with %v:\n%s", what, p.State(), p.log)
		default:
		}
		if time.Now().After(deadline) {
			p.t.Fatalf("waited %s in vain for %s", patience, what)
		}
	}
}

// terminate sends SIGTERM and returns the exit code.
func (p *plugin) terminate() int {
	p.t.Helper()
	if err := p.Signal(syscall.SIGTERM); err != nil {
		p.t.Fatal(err)
	}
	return p.ended()
}

// ended waits until the plugin ends, and returns the exit code.
func (p *plugin) ended() int {
	p.t.Helper()
	select {
	case <-p.Exited():
		return p.State().ExitCode()
	case <-time.After(patience):
		p.t.Fatalf("the plugin did not end within %s", patience)
		return -1
	}
}

// publish publishes a volume, which must succeed.
func (p *plugin) publish(r *csi.NodePublishVolumeRequest) {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.t.Context(), patience)
	defer cancel()
	if _, err := p.NodePublishVolume(ctx, r); err != nil {
		p.t.Fatal(err)
	}
}

// unpublish unpublishes a volume, which must succeed and remove the target.
func (p *plugin) unpublish(r *csi.NodePublishVolumeRequest) {
	p.t.Helper()
	if _, err := p.NodeUnpublishVolume(p.t.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: r.VolumeId, TargetPath: r.TargetPath}); err != nil {
		p.t.Error(err)
	}
	if _, err := os.Lstat(r.TargetPath); !errors.Is(err, os.ErrNotExist) {
		p.t.Errorf("target %s is still there: %v", r.TargetPath, err)
	}
}

// refused publishes a volume, which must fail with a code and a message and leave nothing.
func (p *plugin) refused(r *csi.NodePublishVolumeRequest, code codes.Code, says ...string) {
	p.t.Helper()
	p.mustKeep(func() {
		p.t.Helper()
		ctx, cancel := context.WithTimeout(p.t.Context(), patience)
		defer cancel()
		_, err := p.NodePublishVolume(ctx, r)
		p.t.Log(err)
		mustSay(p.t, err, code, says...)
	})
}
