// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package torture

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/moby/sys/mountinfo"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/csi-disktemplate/csi-disktemplate/internal/failpoint"
	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/process"
)

// patience is for one call, a VM's included, on a machine that is busy.
const patience = 2 * time.Minute

// count is how often something is done: what the environment says, or a number that
// suits every run.
func count(t *testing.T, usual int) int {
	t.Helper()
	s := os.Getenv("COUNT")
	if s == "" {
		return usual
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < 1 {
		t.Fatalf("COUNT=%s: must be a number from 1", s)
	}
	return n
}

// seeded returns what decides all that is random in a test. Its seed is printed, so that
// the test can be made again.
func seeded(t *testing.T) *rand.Rand {
	t.Helper()
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("SEED"); s != "" {
		n, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			t.Fatalf("SEED=%s: must be a number", s)
		}
		seed = n
	}
	fmt.Printf("%s: SEED=%d\n", t.Name(), seed) // of a test that passes, too
	return rand.New(rand.NewPCG(seed, 0))
}

// node is a machine as the plugin sees it: a pool, and kubelet's directory.
type node struct {
	t             *testing.T
	pool, kubelet string
	race          bool   // the plugin has the race detector
	fail          string // where plans are for the failpoints
	plan          int
	// One connection outlives all plugins, as that of a sidecar does.
	csi.NodeClient
	csi.ControllerClient
	csi.IdentityClient
	*plugin
}

// plugin is a process of the product.
type plugin struct {
	cmd    *exec.Cmd
	log    string
	exited chan struct{}
}

// newNode is on a filesystem that is mounted already.
func newNode(t *testing.T, mounted string) *node {
	t.Helper()
	n := &node{t: t, pool: filepath.Join(mounted, "pool"), kubelet: testenv.Dir(t), fail: t.TempDir()}
	n.mkdir("pods/uid-plugin") // it is in a pod itself
	conn, err := grpc.NewClient(n.endpoint(), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: 2 * time.Millisecond, Multiplier: 1.5, MaxDelay: 50 * time.Millisecond}, MinConnectTimeout: time.Second}))
	if err != nil {
		t.Fatal(err)
	}
	n.NodeClient, n.ControllerClient, n.IdentityClient = csi.NewNodeClient(conn), csi.NewControllerClient(conn), csi.NewIdentityClient(conn)
	t.Cleanup(func() { conn.Close() })
	t.Cleanup(func() {
		if n.plugin != nil {
			n.kill()
			if t.Failed() {
				t.Logf("the end of the last plugin's log:\n%s", tail(n.log))
			}
		}
		testenv.Sweep(t, n.kubelet, n.pool)
	})
	return n
}

func (n *node) endpoint() string { return "unix://" + filepath.Join(n.kubelet, "csi.sock") }

func tail(path string) string {
	b, _ := os.ReadFile(path)
	return string(b[max(0, len(b)-8000):])
}

func (n *node) mkdir(rel string) string {
	n.t.Helper()
	path := filepath.Join(n.kubelet, rel)
	if err := os.MkdirAll(path, 0o750); err != nil {
		n.t.Fatal(err)
	}
	return path
}

// launch starts the plugin, and does not wait.
func (n *node) launch() {
	n.t.Helper()
	log, err := os.CreateTemp(n.t.TempDir(), "plugin-*.log")
	if err != nil {
		n.t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command(testenv.FailingBinary(n.t, n.race),
		"--endpoint", n.endpoint(), "--node-id", "node", "--pool", n.pool, "--kubelet-dir", n.kubelet, "--accel", "tcg", "--headroom", "0")
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Env = append(os.Environ(), failpoint.Env+"="+n.fail, failpoint.InitEnv+"="+testenv.Binary(n.t), "GORACE=halt_on_error=1 exitcode=66")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C is for the test
	if err := cmd.Start(); err != nil {
		n.t.Fatal(err)
	}
	p := &plugin{cmd: cmd, log: log.Name(), exited: make(chan struct{})}
	go func() {
		cmd.Wait()
		close(p.exited)
	}()
	n.plugin = p
}

// serves waits until the plugin answers, or has ended.
func (n *node) serves() bool {
	p := n.plugin
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	go func() {
		select {
		case <-p.exited:
			cancel()
		case <-ctx.Done():
		}
	}()
	for {
		_, err := n.GetPluginInfo(ctx, &csi.GetPluginInfoRequest{}, grpc.WaitForReady(true))
		if status.Code(err) != codes.Unavailable { // on what was left of the connection to the one before
			return err == nil
		}
	}
}

// start starts the plugin and waits until it serves.
func (n *node) start() {
	n.t.Helper()
	n.launch()
	if !n.serves() {
		n.t.Fatalf("the plugin does not serve: %v\n%s", n.cmd.ProcessState, tail(n.log))
	}
}

// kill ends the plugin by SIGKILL, if that has not happened yet.
func (n *node) kill() {
	n.t.Helper()
	n.cmd.Process.Kill()
	n.mustBeKilled()
}

// mustBeKilled waits for the end of the plugin, which must have no other reason: not a
// panic, nor a data race.
func (n *node) mustBeKilled() {
	n.t.Helper()
	<-n.exited
	if s, ok := n.cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || !s.Signaled() || s.Signal() != syscall.SIGKILL {
		n.t.Fatalf("the plugin ended with %v:\n%s", n.cmd.ProcessState, tail(n.log))
	}
}

// killed reports whether a call's error is that the plugin was killed.
func (n *node) killed(err error) bool {
	n.t.Helper()
	if status.Code(err) != codes.Unavailable {
		return false
	}
	select {
	case <-n.exited:
		n.mustBeKilled()
		return true
	case <-time.After(10 * time.Second):
		return false
	}
}

// arm has the plugin do something before its at-th effect from now on.
func (n *node) arm(at int, what string) {
	n.t.Helper()
	n.plan++
	// Renamed into place, so that no plan is read half-written.
	path := filepath.Join(n.fail, failpoint.PlanFile)
	if err := errors.Join(os.WriteFile(path+".new", fmt.Appendf(nil, "%d %d %s\n", n.plan, at, what), 0o600), os.Rename(path+".new", path)); err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) disarm() { n.arm(0, "kill") }

// trace lists the effects since the last plan.
func (n *node) trace() []string {
	n.t.Helper()
	b, err := os.ReadFile(filepath.Join(n.fail, fmt.Sprint(failpoint.TraceFile, n.plan)))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		n.t.Fatal(err)
	}
	return strings.Fields(strings.ReplaceAll(string(b), " ", "_"))
}

// volumes says what there is of volumes: images, loop devices, mounts, and processes that
// hold what is half-made.
func (n *node) volumes() string {
	n.t.Helper()
	var found []string
	for _, dir := range []string{"volumes", "snapshots"} {
		entries, err := os.ReadDir(filepath.Join(n.pool, dir))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			n.t.Fatal(err)
		}
		for _, e := range entries {
			found = append(found, dir+"/"+e.Name())
		}
	}
	found = append(found, testenv.LoopsBelow(n.t, n.pool)...)
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(n.kubelet))
	if err != nil {
		n.t.Fatal(err)
	}
	for _, m := range mounts {
		found = append(found, m.Mountpoint)
	}
	for _, dir := range []string{"volumes", "snapshots", "templates"} {
		holders, err := process.HoldingUnnamed(filepath.Join(n.pool, dir))
		if err != nil {
			n.t.Fatal(err)
		}
		for _, h := range holders {
			if n.plugin == nil || h.PID != n.cmd.Process.Pid {
				found = append(found, fmt.Sprintf("process %d with %s", h.PID, h.File))
			}
		}
	}
	return strings.Join(found, " ")
}

// mustHave compares the volumes with what there was. On a node udev may hold a block
// device open for a moment, and a process that is being started a copy of a mount.
func (n *node) mustHave(when, want string) {
	n.t.Helper()
	got := n.volumes()
	for deadline := time.Now().Add(5 * time.Second); got != want && time.Now().Before(deadline); got = n.volumes() {
		time.Sleep(5 * time.Millisecond)
	}
	if got != want {
		n.t.Fatalf("%s: there is %q, expected %q\n%s", when, got, want, tail(n.log))
	}
}

// must ends the test with an error.
func (n *node) must(what string, err error) {
	n.t.Helper()
	if err != nil {
		n.t.Fatalf("%s: %v\n%s", what, err, tail(n.log))
	}
}

// in is a context for one call.
func in() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), patience)
}

// disk is a volume as the container orchestrator knows it: an inline one, or a claim.
type disk struct {
	id, fs string
	bytes  int64
	inline bool
	label  string
	mode   string // filesystem, diskImage or block
	thick  bool
	source *csi.VolumeContentSource
}

const mib = 1 << 20

// sizes are the smallest, more or less.
var sizes = map[string]int64{"ext4": 64 * mib, "xfs": 300 * mib, "btrfs": 128 * mib}

func inline(id, fs, mode string) *disk {
	return &disk{id: id, fs: fs, bytes: sizes[fs], inline: true, mode: mode}
}

func claim(id, fs, mode string) *disk { return &disk{id: id, fs: fs, bytes: sizes[fs], mode: mode} }

func (d *disk) capability() *csi.VolumeCapability {
	c := &csi.VolumeCapability{AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER}}
	if d.mode == "block" {
		c.AccessType = &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}}
	} else {
		c.AccessType = &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{FsType: d.fs}}
	}
	return c
}

func (n *node) podDir(d *disk) string { return filepath.Join(n.kubelet, "pods", "uid-"+d.id) }

// target is where a disk is published, and staging where it is staged. Their parents are
// made here, as kubelet does.
func (n *node) target(d *disk) string {
	n.t.Helper()
	return filepath.Join(n.mkdir("pods/uid-"+d.id+"/volumes/kubernetes.io~csi/v"), "mount")
}

func (n *node) staging(d *disk) string {
	n.t.Helper()
	return n.mkdir("plugins/kubernetes.io/csi/" + d.id + "/globalmount")
}

func (n *node) create(d *disk) error {
	ctx, cancel := in()
	defer cancel()
	parameters := map[string]string{}
	if d.thick {
		parameters["provisioning"] = "thick"
	}
	if d.mode == "diskImage" {
		parameters["publishAs"] = "diskImage"
	}
	_, err := n.CreateVolume(ctx, &csi.CreateVolumeRequest{
		Name: d.id, Parameters: parameters, VolumeContentSource: d.source,
		VolumeCapabilities: []*csi.VolumeCapability{d.capability()},
		CapacityRange:      &csi.CapacityRange{RequiredBytes: d.bytes},
	})
	return err
}

func (n *node) delete(d *disk) error {
	ctx, cancel := in()
	defer cancel()
	_, err := n.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: d.id})
	return err
}

func (n *node) stage(d *disk) error {
	ctx, cancel := in()
	defer cancel()
	_, err := n.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{VolumeId: d.id, StagingTargetPath: n.staging(d), VolumeCapability: d.capability()})
	return err
}

func (n *node) unstage(d *disk) error {
	ctx, cancel := in()
	defer cancel()
	_, err := n.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: d.id, StagingTargetPath: n.staging(d)})
	return err
}

func (n *node) publish(d *disk) error {
	ctx, cancel := in()
	defer cancel()
	r := &csi.NodePublishVolumeRequest{VolumeId: d.id, TargetPath: n.target(d), VolumeCapability: d.capability()}
	if d.inline {
		r.VolumeContext = map[string]string{
			"csi.storage.k8s.io/ephemeral": "true", "csi.storage.k8s.io/pod.name": "pod-" + d.id,
			"csi.storage.k8s.io/pod.namespace": "torture", "csi.storage.k8s.io/pod.uid": "uid-" + d.id,
			"size": fmt.Sprint(d.bytes), "publishAs": d.mode,
		}
		if d.label != "" {
			r.VolumeContext["label"] = d.label
		}
	} else {
		r.StagingTargetPath = n.staging(d)
	}
	_, err := n.NodePublishVolume(ctx, r)
	return err
}

func (n *node) unpublish(d *disk) error {
	ctx, cancel := in()
	defer cancel()
	_, err := n.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: d.id, TargetPath: n.target(d)})
	return err
}

func (n *node) expand(d *disk, bytes int64) error {
	ctx, cancel := in()
	defer cancel()
	_, err := n.ControllerExpandVolume(ctx, &csi.ControllerExpandVolumeRequest{VolumeId: d.id, CapacityRange: &csi.CapacityRange{RequiredBytes: bytes}})
	return err
}

func (n *node) expandOnNode(d *disk, bytes int64) error {
	ctx, cancel := in()
	defer cancel()
	_, err := n.NodeExpandVolume(ctx, &csi.NodeExpandVolumeRequest{VolumeId: d.id, VolumePath: n.target(d), CapacityRange: &csi.CapacityRange{RequiredBytes: bytes}})
	return err
}

func (n *node) snapshot(name string, d *disk) error {
	ctx, cancel := in()
	defer cancel()
	_, err := n.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: name, SourceVolumeId: d.id})
	return err
}

func (n *node) deleteSnapshot(name string) error {
	ctx, cancel := in()
	defer cancel()
	_, err := n.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: name})
	return err
}

// copyOf is a claim with the content of a snapshot, or of another claim.
func copyOf(id string, from *disk, snapshot string) *disk {
	d := *from
	d.id = id
	if snapshot != "" {
		d.source = &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: snapshot}}}
	} else {
		d.source = &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Volume{Volume: &csi.VolumeContentSource_VolumeSource{VolumeId: from.id}}}
	}
	return &d
}

// content is what a pod has written to a disk that is published: a word, synced.
const contentSize = 4096

func (n *node) contentFile(d *disk) string {
	switch d.mode {
	case "block":
		return n.target(d)
	case "diskImage":
		return filepath.Join(n.target(d), "disk.img")
	}
	return filepath.Join(n.target(d), "content")
}

// write writes a word as a pod does, and syncs it.
func (n *node) write(d *disk, word string) error {
	flags := os.O_RDWR
	if d.mode == "filesystem" {
		flags |= os.O_CREATE
	}
	f, err := os.OpenFile(n.contentFile(d), flags, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	b := make([]byte, contentSize)
	copy(b, word)
	if _, err := f.WriteAt(b, 0); err != nil {
		return err
	}
	return f.Sync()
}

// read reads what was written last, as a pod does.
func (n *node) read(d *disk) (string, error) {
	f, err := os.Open(n.contentFile(d))
	if err != nil {
		return "", err
	}
	defer f.Close()
	b := make([]byte, contentSize)
	if _, err := f.ReadAt(b, 0); err != nil {
		return "", err
	}
	return strings.TrimRight(string(b), "\x00"), nil
}

// holds is an error if a disk that is published does not have a word.
func (n *node) holds(d *disk, words ...string) error {
	got, err := n.read(d)
	if err != nil {
		return err
	}
	for _, w := range words {
		if got == w {
			return nil
		}
	}
	return fmt.Errorf("volume %s holds %.40q, not %q", d.id, got, words)
}

// all does one thing after the other, up to the first that fails.
func all(steps ...func() error) error {
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// use creates, stages, publishes a claim and writes to it; unuse takes it away.
func (n *node) use(d *disk, word string) error {
	if d.inline {
		return all(func() error { return n.publish(d) }, func() error { return n.write(d, word) })
	}
	return all(func() error { return n.create(d) }, func() error { return n.stage(d) },
		func() error { return n.publish(d) }, func() error { return n.write(d, word) })
}

func (n *node) unuse(d *disk) error {
	if d.inline {
		return n.unpublish(d)
	}
	return all(func() error { return n.unpublish(d) }, func() error { return n.unstage(d) }, func() error { return n.delete(d) })
}

// forget has kubelet forget the pod of a disk, and the places where it was, without a
// word to the plugin: the node was rebooted, and the pod deleted meanwhile.
func (n *node) forget(d *disk) {
	n.t.Helper()
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(n.target(d)))
	if err != nil {
		n.t.Fatal(err)
	}
	for i := len(mounts) - 1; i >= 0; i-- {
		testenv.Run(n.t, "umount", mounts[i].Mountpoint)
	}
	if err := errors.Join(os.RemoveAll(n.podDir(d)), os.RemoveAll(filepath.Join(n.kubelet, "plugins/kubernetes.io/csi", d.id))); err != nil {
		n.t.Fatal(err)
	}
}
