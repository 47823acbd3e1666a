// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package driver

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
)

// patience is for what takes a VM, on a machine that runs other tests as well.
const patience = 90 * time.Second

// node is a machine as the plugin sees it: a pool and kubelet's directory.
type node struct {
	t             *testing.T
	pool, kubelet string
}

// newNode makes a node with a pool of the given kind. The test must leave it
// without volumes, loop devices and mounts.
func newNode(t *testing.T, kind testenv.Kind, size int64) *node {
	t.Helper()
	n := &node{t: t, pool: filepath.Join(kind.Mount(t, size), "pool"), kubelet: testenv.Dir(t)}
	n.target("plugin") // it is in a pod itself
	t.Cleanup(func() {
		t.Helper()
		n.mustHave("none")
		testenv.Sweep(t, n.kubelet, n.pool) // or removing the directory would empty what is mounted
	})
	return n
}

// with is the same node for a subtest.
func (n *node) with(t *testing.T) *node { return &node{t: t, pool: n.pool, kubelet: n.kubelet} }

// volumes says what there is of volumes: images, loop devices, mounts.
func (n *node) volumes() string {
	n.t.Helper()
	images, err := os.ReadDir(filepath.Join(n.pool, "volumes"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		n.t.Fatal(err)
	}
	snapshots, err := os.ReadDir(filepath.Join(n.pool, "snapshots"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		n.t.Fatal(err)
	}
	loops, mounts := testenv.LoopsBelow(n.t, n.pool), mountsBelow(n.t, n.kubelet)
	if len(images)+len(snapshots)+len(loops)+len(mounts) == 0 {
		return "none"
	}
	return fmt.Sprintf("images %v, snapshots %v, loop devices %v, mounts %v", images, snapshots, loops, mounts)
}

// mustKeep runs a function that must leave the volumes as they are.
func (n *node) mustKeep(f func()) {
	n.t.Helper()
	before := n.volumes()
	f()
	n.mustHave(before)
}

// mustHave compares the volumes with what there was. On a node udev may hold a
// block device open for a moment.
func (n *node) mustHave(want string) {
	n.t.Helper()
	got := n.volumes()
	for deadline := time.Now().Add(5 * time.Second); got != want && time.Now().Before(deadline); got = n.volumes() {
		time.Sleep(10 * time.Millisecond)
	}
	if got != want {
		n.t.Errorf("there was %s\nthere is  %s", want, got)
	}
}

func mountsBelow(t *testing.T, dir string) []string {
	t.Helper()
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for line := range strings.Lines(string(b)) {
		if at := strings.Fields(line)[4]; strings.HasPrefix(at, dir+"/") {
			found = append(found, at)
		}
	}
	slices.Reverse(found) // those mounted last come first
	return found
}

// files lists every name in the pool but directories.
func (n *node) files() []string {
	n.t.Helper()
	var found []string
	err := filepath.WalkDir(n.pool, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			found = append(found, strings.TrimPrefix(path, n.pool+"/"))
		}
		return err
	})
	if err != nil {
		n.t.Fatal(err)
	}
	return found
}

// target is a target path as kubelet makes it, with its parent.
func (n *node) target(id string) string {
	n.t.Helper()
	dir := filepath.Join(n.kubelet, "pods", "uid-of-"+id, "volumes", "kubernetes.io~csi", "scratch")
	if err := os.MkdirAll(dir, 0o750); err != nil {
		n.t.Fatal(err)
	}
	return filepath.Join(dir, "mount")
}

// request is what kubelet sends to publish a volume.
func (n *node) request(id, fsType string, attributes ...string) *csi.NodePublishVolumeRequest {
	n.t.Helper()
	r := inline(fsType, attributes...)
	r.VolumeId, r.TargetPath = id, n.target(id)
	r.VolumeContext[keyPodName] = "pod-of-" + id
	return r
}

// plugin is the product, running.
type plugin struct {
	*node
	cmd    *exec.Cmd
	log    logbook
	exited chan struct{} // closed when cmd.ProcessState is there
	web    string        // its HTTP endpoint
	conn   *grpc.ClientConn
	csi.NodeClient
	csi.ControllerClient
	csi.IdentityClient
}

// start starts the plugin on the node, and waits until it serves. It is killed
// when the test ends.
func (n *node) start(flags ...string) *plugin {
	n.t.Helper()
	endpoint := "unix://" + filepath.Join(n.kubelet, "csi.sock")
	log, err := os.CreateTemp(n.t.TempDir(), "plugin-*.log")
	if err != nil {
		n.t.Fatal(err)
	}
	defer log.Close()
	p := &plugin{node: n, log: logbook{n.t, log.Name()}, exited: make(chan struct{})}
	p.cmd = exec.Command(testenv.Binary(n.t), append([]string{
		"--endpoint", endpoint, "--node-id", "node-of-test", "--pool", n.pool, "--kubelet-dir", n.kubelet,
		"--http-endpoint", "127.0.0.1:0", "--accel", "tcg", "-v", "5"}, flags...)...)
	p.cmd.Stdout, p.cmd.Stderr = log, log
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C is for the test
	if err := p.cmd.Start(); err != nil {
		n.t.Fatal(err)
	}
	go func() {
		p.cmd.Wait()
		close(p.exited)
	}()
	n.t.Cleanup(func() {
		p.kill()
		if n.t.Failed() {
			n.t.Logf("the log of the plugin with the pid %d:\n%s", p.cmd.Process.Pid, p.log.loud())
		}
	})
	p.await("serving", func() bool { return strings.Contains(p.log.String(), `"Serving CSI"`) })
	m := regexp.MustCompile(`"Serving health and metrics" address="([^"]+)"`).FindStringSubmatch(p.log.String())
	if m == nil {
		n.t.Fatalf("no HTTP endpoint in\n%s", p.log)
	}
	p.web = m[1]
	conn, err := grpc.NewClient(endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { conn.Close() })
	p.conn, p.NodeClient, p.ControllerClient, p.IdentityClient = conn, csi.NewNodeClient(conn), csi.NewControllerClient(conn), csi.NewIdentityClient(conn)
	return p
}

// with is the same plugin for a subtest.
func (p *plugin) with(t *testing.T) *plugin {
	q := *p
	q.node, q.log.t = p.node.with(t), t
	return &q
}

// await waits for something of a living plugin.
func (p *plugin) await(what string, ok func() bool) {
	p.t.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(2 * time.Millisecond) {
		select {
		case <-p.exited:
			p.t.Fatalf("%s: the plugin ended with %v:\n%s", what, p.cmd.ProcessState, p.log)
		default:
		}
		if time.Now().After(deadline) {
			p.t.Fatalf("waited %s in vain: %s", patience, what)
		}
	}
}

// kill ends the plugin by SIGKILL and waits until it is gone.
func (p *plugin) kill() {
	p.cmd.Process.Kill() // may have ended before
	<-p.exited
}

// terminate sends SIGTERM and returns the exit code.
func (p *plugin) terminate() int {
	p.t.Helper()
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		p.t.Fatal(err)
	}
	return p.ended()
}

// ended waits for the end and returns the exit code.
func (p *plugin) ended() int {
	p.t.Helper()
	select {
	case <-p.exited:
		return p.cmd.ProcessState.ExitCode()
	case <-time.After(patience):
		p.t.Fatalf("the plugin did not end within %s", patience)
		return -1
	}
}

// publish publishes what must succeed.
func (p *plugin) publish(r *csi.NodePublishVolumeRequest) {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.t.Context(), patience)
	defer cancel()
	if _, err := p.NodePublishVolume(ctx, r); err != nil {
		p.t.Fatal(err)
	}
}

func (p *plugin) unpublish(r *csi.NodePublishVolumeRequest) {
	p.t.Helper()
	if _, err := p.NodeUnpublishVolume(p.t.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: r.VolumeId, TargetPath: r.TargetPath}); err != nil {
		p.t.Error(err)
	}
	if _, err := os.Lstat(r.TargetPath); !errors.Is(err, os.ErrNotExist) {
		p.t.Errorf("target %s is still there: %v", r.TargetPath, err)
	}
}

// refused publishes what must fail with a code and a message, and must leave
// nothing.
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

// get reads a page.
func (p *plugin) get(path string) (int, string) {
	p.t.Helper()
	r, err := http.Get("http://" + p.web + path)
	if err != nil {
		p.t.Fatal(err)
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	if err != nil {
		p.t.Fatal(err)
	}
	return r.StatusCode, string(b)
}

// metric sums a metric over its labels.
func (p *plugin) metric(name string) (sum float64) {
	p.t.Helper()
	_, page := p.get("/metrics")
	for line := range strings.Lines(page) {
		if rest, ok := strings.CutPrefix(line, name); ok && strings.ContainsAny(rest[:1], "{ ") {
			v, err := strconv.ParseFloat(line[strings.LastIndexByte(line, ' ')+1:len(line)-1], 64)
			if err != nil {
				p.t.Fatal(err)
			}
			sum += v
		}
	}
	return sum
}

const builds = "csi_disktemplate_template_build_duration_seconds_count"

// children lists the processes the plugin has started and that are still there;
// proc_pid_task(5).
func (p *plugin) children() (pids []int) {
	p.t.Helper()
	lists, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", p.cmd.Process.Pid))
	if err != nil || lists == nil {
		p.t.Fatalf("no children files of %d (a kernel without CONFIG_PROC_CHILDREN?): %v", p.cmd.Process.Pid, err)
	}
	for _, list := range lists {
		b, _ := os.ReadFile(list) // the thread may have ended
		for _, word := range strings.Fields(string(b)) {
			pid, err := strconv.Atoi(word)
			if err != nil {
				p.t.Fatal(err)
			}
			pids = append(pids, pid)
		}
	}
	return pids
}

// waited is what the kernel has added up of the children that the plugin waited
// for: page faults and time; proc_pid_stat(5), fields 11, 13, 16 and 17.
func (p *plugin) waited() [4]string {
	p.t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.cmd.Process.Pid))
	if err != nil {
		p.t.Fatal(err)
	}
	f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:])) // from field 3
	return [4]string{f[11-3], f[13-3], f[16-3], f[17-3]}
}

// vm waits until QEMU runs, and returns its pid.
func (p *plugin) vm() (pid int) {
	p.t.Helper()
	p.await("a VM", func() bool {
		for _, child := range p.children() {
			if cmd, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", child)); bytes.Contains(cmd, []byte("microvm")) {
				pid = child
			}
		}
		return pid != 0
	})
	return pid
}

// gone waits until a process is no more.
func gone(t *testing.T, pid int) {
	t.Helper()
	testenv.Eventually(t, fmt.Sprintf("the end of process %d", pid), func() bool {
		return errors.Is(syscall.Kill(pid, 0), syscall.ESRCH)
	})
}

// logbook is the file that a plugin logs to: a line is there before the answer
// to its call is.
type logbook struct {
	t    *testing.T
	path string
}

func (l logbook) String() string {
	l.t.Helper()
	b, err := os.ReadFile(l.path)
	if err != nil {
		l.t.Fatal(err)
	}
	return string(b)
}

// lines returns those that contain every one of the words.
func (l logbook) lines(words ...string) (found []string) {
	for line := range strings.Lines(l.String()) {
		if !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(line, w) }) {
			found = append(found, line)
		}
	}
	return found
}

// loud is the log without what csi-sanity asks for a thousand times.
func (l logbook) loud() string {
	var b strings.Builder
	for line := range strings.Lines(l.String()) {
		if !strings.Contains(line, "Capabilities") {
			b.WriteString(line)
		}
	}
	return b.String()
}
