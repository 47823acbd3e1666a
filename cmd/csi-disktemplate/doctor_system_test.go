// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"

	"github.com/csi-disktemplate/csi-disktemplate/internal/failpoint"
	"github.com/csi-disktemplate/csi-disktemplate/internal/harness"
	"github.com/csi-disktemplate/csi-disktemplate/internal/harness/harnesstest"
	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/admin"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/driver"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/health"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/fsctl"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
)

// patient is a node where something is broken, and what is said about that.
type patient struct {
	kind testenv.Kind // of the filesystem that has the pool; xfs if it is nil
	// script breaks something in the mount namespace of the program that is started by it.
	script string
	env    []string
	flags  []string
	// breaks breaks something for a plugin that serves already; pid is 0 where none runs.
	breaks func(t *testing.T, n harness.Node, pid int)
	// mends undoes that, if the plugin could not end else.
	mends       func(t *testing.T, n harness.Node)
	binary      func(t testing.TB) string
	requirement string
	state       health.State
	code        string
	says        []string // in what is wrong, what it costs and what to do
	alone       bool     // only doctor can tell: no plugin starts here
	onlyRunning bool     // only a plugin can tell
	late        bool     // it is seen a while after
}

func hide(program string) string {
	return `mount --bind /dev/null "$(readlink -f "$(PATH=$PATH:/usr/sbin:/sbin command -v ` + program + `)")"; `
}

// patients are the nodes on which each thing is broken in turn.
var patients = map[string]patient{
	"no QEMU": {
		script: hide("qemu-system-x86_64"), requirement: "qemu", state: health.StateBroken, code: health.FormatterUnavailable,
		says: []string{"qemu-system-x86_64 is in none of", "install the package qemu-system-x86"},
	},
	"no kernel": {
		script: "mount -t tmpfs none /boot; ", requirement: "vm-kernel", state: health.StateBroken, code: health.FormatterUnavailable,
		says: []string{"no kernel /boot/vmlinuz-*", "install the package linux-image-cloud-amd64"},
	},
	"no mkfs": {
		script: hide("mke2fs"), requirement: "mkfs", state: health.StateBroken, code: health.FormatterUnavailable,
		says: []string{"mkfs.ext4 is in none of", "install the package e2fsprogs"},
	},
	"pool on ext4": {
		kind: testenv.Ext4, alone: true, requirement: "pool", state: health.StateBroken, code: health.PoolUnusable,
		says: []string{"is on ext4", "--loopback-pool-size"},
	},
	"xfs without reflink": {
		kind: testenv.XFSNoReflink, alone: true, requirement: "reflink", state: health.StateBroken, code: health.PoolUnusable,
		says: []string{"a trial clone", "reflink=1"},
	},
	"a loopback pool that is too small": {
		kind: testenv.Ext4, flags: []string{"--loopback-pool-size", "10Mi"}, alone: true,
		requirement: "pool", state: health.StateBroken, code: health.PoolUnusable, says: []string{"at least 300Mi"},
	},
	"the host below the pool is full": {
		kind: testenv.Ext4, flags: []string{"--loopback-pool-size", "400Mi"}, onlyRunning: true,
		breaks:      func(t *testing.T, n harness.Node, _ int) { testenv.Fill(t, filepath.Dir(n.Pool)) },
		requirement: "pool-space", state: health.StateDegraded, code: health.PoolFull,
		says: []string{"pool is full", "the ext4 of", "new volumes are refused", "make room on the filesystem below the pool"},
	},
	"the pool's disk hangs": {
		onlyRunning: true, late: true, breaks: freeze, mends: thaw,
		requirement: "reflink", state: health.StateBroken, code: health.PoolUnusable,
		says: []string{"a trial that began at", "has not ended", "see the kernel log"},
	},
	"the host has less than the pool is to have": {
		kind: testenv.Ext4, flags: []string{"--loopback-pool-size", "2Gi"},
		requirement: "layers", state: health.StateDegraded, code: health.PoolLimited, says: []string{"room", "make room"},
	},
	"no loop devices left": {
		kind: testenv.XFS, onlyRunning: true,
		env:         []string{failpoint.Env + "=%s"},
		binary:      func(t testing.TB) string { return testenv.FailingBinary(t, false) },
		breaks:      noLoopsLeft,
		requirement: "loop-devices", state: health.StateBroken, code: health.LoopUnavailable,
		says: []string{"there is no loop device to be had", "LOOP_CTL_ADD", "dmesg"},
	},
	"private /dev": {
		script:      "mount -t tmpfs none /dev; mknod -m 666 /dev/null c 1 3; mknod -m 666 /dev/urandom c 1 9; ",
		requirement: "accelerator", state: health.StateDegraded, code: health.NoKVM,
		says: []string{"open /dev/kvm: no such file", "seconds longer", "give the container /dev/kvm"},
	},
	"KVM that runs no guest": {
		script:      "touch /dev/kvm; mount --bind /dev/zero /dev/kvm; ",
		requirement: "accelerator", state: health.StateDegraded, code: health.NoKVM, says: []string{"KVM is not usable", "seconds longer", "--prewarm"},
	},
	"KVM was asked for": {
		script: "touch /dev/kvm; mount --bind /dev/zero /dev/kvm; ", flags: []string{"--accel", "kvm"}, onlyRunning: true,
		requirement: "accelerator", state: health.StateBroken, code: health.FormatterUnavailable, says: []string{"--accel=tcg"},
	},
	"the registry is away": {
		onlyRunning: true, late: true, flags: []string{"--contents", "%s/contents"}, // it is asked in the background
		requirement: "contents", state: health.StateDegraded, code: health.ContentFailed, says: []string{"127.0.0.1:1/", "tries again"},
	},
	"CAP_SYS_RESOURCE is missing": {
		script:      `set -- setpriv --bounding-set=-sys_resource "$@"; `,
		requirement: "capabilities", state: health.StateDegraded, code: health.CapabilityMissing,
		says: []string{"CAP_SYS_RESOURCE", "grows only when", "SYS_RESOURCE"},
	},
	"a pod without Bidirectional": {
		env: []string{"POD_NAME=plugin-1"}, requirement: "kubelet-dir", state: health.StateBroken, code: health.MountsNotShared,
		script: "mount --make-rprivate /; ",
		says:   []string{"empty directories", "mountPropagation: Bidirectional"},
	},
	"no kubelet directory": {
		flags: []string{"--kubelet-dir", "/nonexistent"}, alone: true, requirement: "kubelet-dir", state: health.StateBroken, code: health.KubeletDirUnusable,
		says: []string{"/nonexistent", "mkdir -p"},
	},
	"another driver of this name": {
		breaks:      registerAnother,
		requirement: "driver-name", state: health.StateBroken, code: health.DriverNameTaken, says: []string{"csi.disktemplate.io", "/other.sock", "--driver-name"},
	},
}

// noLoopsLeft makes the kernel's answer to a plugin that wants a new loop device ENOSPC, in its next trial. The plugin
// sees no free ones.
func noLoopsLeft(t *testing.T, n harness.Node, pid int) {
	hidden := fmt.Sprintf("/proc/%d/root/sys/block", pid)
	if len(names(t, hidden)) > 0 {
		testenv.Run(t, "nsenter", "--mount", "--target", fmt.Sprint(pid), "mount", "-t", "tmpfs", "none", "/sys/block")
	}
	// Before it there are: FICLONE of the trial clone, two files and FICLONE of the trial volume, fsync.
	plan := fmt.Sprintf("%d 6 ENOSPC", time.Now().UnixNano())
	if err := os.WriteFile(filepath.Join(n.Kubelet, failpoint.PlanFile), []byte(plan), 0o600); err != nil {
		t.Fatal(err)
	}
}

// freeze makes whoever writes to the pool wait, as a disk does that no longer answers: FIFREEZE of ioctl_fs(2).
func freeze(_ *testing.T, n harness.Node, _ int) {
	_ = exec.Command("fsfreeze", "--freeze", n.Pool).Run() // it may be frozen
}

func thaw(t *testing.T, n harness.Node) { testenv.Run(t, "fsfreeze", "--unfreeze", n.Pool) }

// registrar is a node-driver-registrar of another driver.
type registrar struct {
	registration.UnimplementedRegistrationServer
	endpoint string
}

func (r registrar) GetInfo(context.Context, *registration.InfoRequest) (*registration.PluginInfo, error) {
	return &registration.PluginInfo{Type: registration.CSIPlugin, Name: driver.DefaultName, Endpoint: r.endpoint}, nil
}

func registerAnother(t *testing.T, n harness.Node, _ int) {
	dir := filepath.Join(n.Kubelet, "plugins_registry")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	other := filepath.Join(n.Kubelet, "other.sock")
	if err := os.WriteFile(other, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, driver.DefaultName+"-reg.sock")
	os.Remove(socket)
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	registration.RegisterRegistrationServer(server, registrar{endpoint: other})
	go server.Serve(l)
	t.Cleanup(server.Stop)
}

// within is the command that breaks something and starts another one.
func (p patient) within(keep ...string) []string {
	return []string{"unshare", "--mount", "--propagation", "slave", "sh", "-c", testenv.DropOthers(keep...) + p.script + `exec "$@"`, "sh"}
}

func (p patient) filled(texts []string, dir string) (filled []string) {
	for _, text := range texts {
		filled = append(filled, strings.ReplaceAll(text, "%s", dir))
	}
	return filled
}

// diagnosis is what doctor -o json prints.
type diagnosis struct {
	State    health.State
	Findings []health.Finding
	code     int
}

func diagnose(t *testing.T, cmd *exec.Cmd) (d diagnosis) {
	t.Helper()
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, _ := cmd.Output() // its error is the exit code
	if err := json.Unmarshal(out, &d); err != nil {
		t.Fatalf("%v: %v: %s%s", cmd, err, out, &stderr)
	}
	d.code = cmd.ProcessState.ExitCode()
	return d
}

// about returns what is found about a requirement.
func (d diagnosis) about(requirement string) (found []health.Finding) {
	for _, f := range d.Findings {
		if f.Requirement == requirement {
			found = append(found, f)
		}
	}
	return found
}

// mustSay checks doctor's lines about what is broken, and its exit code.
func (p patient) mustSay(t *testing.T, d diagnosis) {
	t.Helper()
	exits := map[health.State]int{health.StateGood: 0, health.StateDegraded: 1, health.StateBroken: 2}
	if d.State != health.Worst(d.Findings) || d.code != exits[d.State] || d.code < exits[p.state] {
		t.Errorf("the state is %s, the exit code %d", d.State, d.code)
	}
	if slices.ContainsFunc(d.about(p.requirement), p.isAbout) {
		return
	}
	t.Errorf("doctor says nothing of %s %s: %q; but %+v", p.requirement, p.state, p.says, d.about(p.requirement))
}

// isAbout reports whether a finding tells what is broken, and what to do.
func (p patient) isAbout(f health.Finding) bool {
	return f.State == p.state && f.Code == p.code && f.Remedy != "" && contains(f.Message(), p.says)
}

func contains(text string, all []string) bool {
	return !slices.ContainsFunc(all, func(s string) bool { return !strings.Contains(text, s) })
}

// page reads a page of a plugin that listens on a port.
func page(t *testing.T, address, path string) string {
	t.Helper()
	r, err := http.Get("http://" + address + path)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestDoctor breaks each thing in turn. Doctor names it and what to do, without a plugin and beside one, and so do
// /readyz?verbose, the page and the metrics of the plugin. One browser looks at the pages of all.
func TestDoctor(t *testing.T) {
	screen := openBrowser(t)
	for name, p := range patients {
		t.Run(name, func(t *testing.T) {
			if p.kind.Name == "" {
				p.kind = testenv.XFS
			}
			if p.binary == nil {
				p.binary = testenv.Binary
			}
			fs := p.kind.Mount(t, 1<<30)
			n := harnesstest.New(t, filepath.Join(fs, "pool"))
			if err := os.WriteFile(filepath.Join(n.Kubelet, "contents"), []byte("contents:\n- {name: away, oci: '127.0.0.1:1/away:latest', namespaces: ['*']}\n"), 0o644); err != nil {
				t.Fatal(err)
			}
			p.env, p.flags = p.filled(p.env, n.Kubelet), p.filled(p.flags, n.Kubelet)
			if !p.onlyRunning {
				if p.breaks != nil {
					p.breaks(t, n, 0)
				}
				args := append(p.within(fs, n.Kubelet), p.binary(t), "doctor", "-o", "json", "--pool", n.Pool, "--kubelet-dir", n.Kubelet)
				cmd := exec.CommandContext(t.Context(), args[0], append(args[1:], p.flags...)...)
				cmd.Env = append(os.Environ(), p.env...)
				p.mustSay(t, diagnose(t, cmd))
				if pool.Made(n.Pool) {
					t.Error("doctor made a pool")
				}
			}
			if !p.alone {
				p.running(t, n, fs, screen)
			}
		})
	}
}

// running has the same seen by a running plugin.
func (p patient) running(t *testing.T, n harness.Node, fs string, screen *browser) {
	address, pageAddress := freeAddress(t), freeAddress(t)
	plugin := harnesstest.Launch(t, n, harness.Command{
		Binary: p.binary(t), Within: p.within(fs, n.Kubelet), ID: "node1", Env: p.env,
		Flags: append([]string{
			"--http-endpoint", address, "--page-endpoint", pageAddress, "--warm-max", "0", "--sweep-interval", "0", "--trim-interval", "0",
		}, p.flags...),
	})
	defer func() {
		if p.mends != nil {
			p.mends(t, n)
		}
		plugin.Kill()
		if t.Failed() {
			t.Log(plugin.Tail())
		}
	}()
	awaitPage(t, plugin, address)
	broken := func() { // whoever asks may have the trials made anew
		if p.breaks != nil {
			p.breaks(t, n, plugin.PID())
		}
	}
	broken()
	verbose := page(t, address, "/readyz?verbose")
	prefix := map[health.State]string{health.StateDegraded: "[+]" + p.requirement + " degraded: ", health.StateBroken: "[-]" + p.requirement + " failed: "}[p.state]
	lines := strings.Split(verbose, "\n")
	if p.late {
		testenv.Eventually(t, "what is wrong", func() bool {
			lines = strings.Split(page(t, address, "/readyz?verbose"), "\n")
			return slices.ContainsFunc(lines, func(l string) bool { return strings.HasPrefix(l, prefix) })
		})
	}
	if !slices.ContainsFunc(lines, func(l string) bool { return strings.HasPrefix(l, prefix) && contains(l, p.says) }) {
		t.Errorf("/readyz?verbose does not say %q with %q:\n%s", prefix, p.says, verbose)
	}
	if metric := fmt.Sprintf("csi_disktemplate_condition{code=%q} 1\n", p.code); !strings.Contains(page(t, address, "/metrics"), metric) {
		t.Errorf("the metrics lack %s", metric)
	}
	broken()
	p.onPage(t, screen, pageAddress)
	broken()
	d := diagnose(t, exec.CommandContext(t.Context(), testenv.Binary(t), "doctor", "-o", "json", "--pool", n.Pool))
	p.mustSay(t, d)
	if f := d.about("plugin"); len(f) != 1 || f[0].State != health.StateGood || !strings.Contains(f[0].Text, fmt.Sprintf("process %d works", plugin.PID())) {
		t.Errorf("of the plugin: %+v", f)
	}
}

// onPage checks the document that the page asks for, and what a browser shows of it: a line with the state, what is
// wrong, and what to do.
func (p patient) onPage(t *testing.T, screen *browser, address string) {
	t.Helper()
	screen.open("http://"+address+"/", "light", 1280)
	defer screen.open("about:blank", "light", 1280) // it would go on to ask
	var d diagnosis
	var rows []string
	defer func() {
		if t.Failed() {
			t.Logf("the page does not say %q of %s; it shows %q, of %+v", p.says, p.requirement, rows, d.about(p.requirement))
		}
	}()
	testenv.Eventually(t, "what the page shows", func() bool {
		if err := json.Unmarshal([]byte(page(t, address, "/v1/findings")), &d.Findings); err != nil {
			t.Fatal(err)
		}
		rows = valueIn[[]string](screen, `[...document.querySelectorAll("#findings tbody tr")].filter(row => row.checkVisibility())
			.map(row => row.innerText.replace(/\s+/g, " "))`)
		return slices.ContainsFunc(d.about(p.requirement), func(f health.Finding) bool { return p.isAbout(f) && shows(rows, f) }) &&
			strings.Contains(screen.text("findings"), p.requirement)
	})
}

// shows reports whether one of the page's rows has what is found.
func shows(rows []string, f health.Finding) bool {
	all := []string{string(f.State), f.Code}
	for _, text := range []string{f.Text, f.Cost, "do: " + f.Remedy} {
		all = append(all, strings.Join(strings.Fields(text), " "))
	}
	return slices.ContainsFunc(rows, func(row string) bool { return contains(row, all) })
}

func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func awaitPage(t *testing.T, p *harness.Plugin, address string) {
	t.Helper()
	testenv.Eventually(t, "the plugin's pages", func() bool {
		if !p.Alive() {
			t.Fatalf("the plugin ended: %s", p.Tail())
		}
		c, err := net.DialTimeout("tcp", address, time.Second)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
}

// TestDoctorWithoutPlugin looks at a pool whose plugin is gone, and from outside of its mount namespace.
func TestDoctorWithoutPlugin(t *testing.T) {
	fs := testenv.Ext4.Mount(t, 600<<20)
	n := harnesstest.New(t, filepath.Join(fs, "pool"))
	p, err := pool.Open(t.Context(), pool.Config{Dir: n.Pool, LoopbackSize: 400 << 20})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.WriteFile(p.Volume("notes"), nil, 0o600), p.Close()); err != nil {
		t.Fatal(err)
	}
	testenv.Umount(t, p.Root())
	d := diagnose(t, exec.CommandContext(t.Context(), testenv.Binary(t), "doctor", "-o", "json", "--pool", n.Pool, "--kubelet-dir", n.Kubelet))
	if f := d.about("plugin"); d.code != 2 || len(f) != 1 || f[0].State != health.StateBroken || !strings.Contains(f[0].Remedy, "start the plugin") {
		t.Errorf("exit code %d; %+v", d.code, f)
	}
	if f := d.about("leftovers"); len(f) != 1 || f[0].State != health.StateDegraded || !strings.Contains(f[0].Text, "left 1 things behind") {
		t.Errorf("%+v", f)
	}
	if f := d.about("pool"); len(f) != 1 || f[0].State != health.StateGood {
		t.Errorf("%+v", f)
	}
	testenv.NoLoopsBelow(t, n.Pool)
}

// TestDoctorSaysPrivate runs doctor with a private /dev, in which it finds loop devices all the same.
func TestDoctorSaysPrivate(t *testing.T) {
	fs := testenv.XFS.Mount(t, 1<<30)
	n := harnesstest.New(t, filepath.Join(fs, "pool"))
	args := append(testenv.OwnDev(fs, n.Kubelet), testenv.Binary(t), "doctor", "-o", "json", "--pool", n.Pool, "--kubelet-dir", n.Kubelet)
	d := diagnose(t, exec.CommandContext(t.Context(), args[0], args[1:]...))
	if f := d.about("loop-devices"); len(f) != 1 || f[0].State != health.StateGood || !strings.Contains(f[0].Text, "/dev is private") {
		t.Errorf("%+v", f)
	}
}

// TestDoctorFindsPlugin runs doctor without flags where one plugin runs, as kubectl exec does: in a PID namespace with it.
func TestDoctorFindsPlugin(t *testing.T) {
	fs := testenv.XFS.Mount(t, 1<<30)
	n := harnesstest.New(t, filepath.Join(fs, "pool"))
	address := freeAddress(t)
	script := `"$0" --pool "$1" --kubelet-dir "$2" --endpoint "unix://$2/csi.sock" --node-id n --http-endpoint ` + address + ` >"$2/log" 2>&1 &
		until curl -sf ` + address + `/healthz; do sleep 0.1; done >/dev/null; "$0" doctor; echo "exit $?"; "$0" doctor -o json >"$2/json"; exit 0`
	cmd := exec.CommandContext(t.Context(), "unshare", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "sh", "-c",
		testenv.DropOthers(fs, n.Kubelet)+script, testenv.Binary(t), n.Pool, n.Kubelet)
	code, out := testenv.Finish(t, cmd)
	if code != 0 || !regexp.MustCompile(`(?m)^good      plugin: +process \d+ works on the pool in `+regexp.QuoteMeta(n.Pool)+"$").MatchString(out) {
		t.Errorf("exit code %d", code)
	}
	if !regexp.MustCompile(`(?m)^exit [012]$`).MatchString(out) {
		t.Error("no exit code of doctor")
	}
}

// TestDoctorAsksSocket runs doctor beside a plugin without an HTTP endpoint, whose loopback pool is mounted in its own
// mount namespace alone. Nobody but the plugin knows of disk images.
func TestDoctorAsksSocket(t *testing.T) {
	n := harnesstest.New(t, filepath.Join(testenv.Ext4.Mount(t, 600<<20), "pool"))
	plugin := harnesstest.Launch(t, n, harness.Command{
		Binary: testenv.Binary(t), ID: "node1", Within: []string{"unshare", "--mount"},
		Flags: []string{"--loopback-pool-size", "400Mi", "--warm-max", "0"},
	})
	defer plugin.Kill()
	var d diagnosis
	testenv.Eventually(t, "the plugin's own findings", func() bool {
		d = diagnose(t, exec.CommandContext(t.Context(), testenv.Binary(t), "doctor", "-o", "json", "--pool", n.Pool))
		return len(d.about("disk-images")) == 1
	})
	if f := d.about("plugin"); len(f) != 1 || f[0].State != health.StateGood {
		t.Errorf("%+v", f)
	}
	if err := plugin.Stop(time.Minute); err != nil {
		t.Error(err)
	}
}

// TestDeadPool asks a plugin whose pool has only errors for whoever reads it, its admin socket included. Doctor, and the
// status that the page shows, say what is wrong, and other commands say who knows.
func TestDeadPool(t *testing.T) {
	n := harness.Node{Pool: filepath.Join(testenv.XFS.Mount(t, 1<<30), "pool"), Kubelet: testenv.Dir(t)} // it has no volumes
	if err := n.Make(); err != nil {
		t.Fatal(err)
	}
	address, pageAddress := freeAddress(t), freeAddress(t)
	plugin := harnesstest.Launch(t, n, harness.Command{
		Binary: testenv.Binary(t), ID: "node1",
		Flags: []string{"--http-endpoint", address, "--page-endpoint", pageAddress, "--warm-max", "0", "--sweep-interval", "0", "--trial-interval", "1s"},
	})
	defer plugin.Kill()
	awaitPage(t, plugin, pageAddress)
	dir, err := os.Open(n.Pool)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	if err := fsctl.Shutdown(dir); err != nil {
		t.Fatal(err)
	}
	dead := func(f health.Finding) bool { return f.Code == health.PoolUnusable && f.State == health.StateBroken }
	var d diagnosis
	testenv.Eventually(t, "doctor", func() bool {
		d = diagnose(t, exec.CommandContext(t.Context(), testenv.Binary(t), "doctor", "-o", "json", "--pool", n.Pool))
		return slices.ContainsFunc(d.Findings, dead)
	})
	if f := d.about("plugin"); d.code != 2 || len(f) != 1 || f[0].State != health.StateGood {
		t.Errorf("exit code %d, of the plugin: %+v", d.code, f)
	}
	var s admin.Status
	text := page(t, pageAddress, "/v1/status")
	if err := json.Unmarshal([]byte(text), &s); err != nil || s.Plugin.PID != plugin.PID() || !slices.ContainsFunc(s.Findings, dead) {
		t.Errorf("the status: %v: %s", err, text)
	}
	out, err := exec.CommandContext(t.Context(), testenv.Binary(t), "status", "--pool", n.Pool).CombinedOutput()
	if err == nil || !contains(string(out), []string{fmt.Sprintf("process %d works on this pool", plugin.PID()), "csi-disktemplate doctor"}) {
		t.Errorf("%v: %s", err, out)
	}
}

// TestRequirementsAreDocumented compares the findings of a plugin that has everything with the table in the documents.
func TestRequirementsAreDocumented(t *testing.T) {
	fs := testenv.XFS.Mount(t, 1<<30)
	n := harnesstest.New(t, filepath.Join(fs, "pool"))
	contents := filepath.Join(n.Kubelet, "contents")
	if err := os.WriteFile(contents, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	registry := filepath.Join(n.Kubelet, "plugins_registry")
	if err := os.MkdirAll(registry, 0o755); err != nil {
		t.Fatal(err)
	}
	address := freeAddress(t)
	plugin := harnesstest.Launch(t, n, harness.Command{Binary: testenv.Binary(t), ID: "node1", Flags: []string{
		"--http-endpoint", address, "--contents", contents, "--goldens", "--wait-for-prewarm", "--registration-dir", registry,
	}})
	defer plugin.Kill()
	awaitPage(t, plugin, address)
	d := diagnose(t, exec.CommandContext(t.Context(), testenv.Binary(t), "doctor", "-o", "json", "--pool", n.Pool))
	var has []string
	for _, f := range d.Findings {
		has = append(has, f.Requirement)
	}
	b, err := os.ReadFile("../../docs/operating.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(b), "\n## Requirements\n")
	section, _, _ = strings.Cut(section, "\n## ")
	var documented []string
	for _, m := range regexp.MustCompile("(?m)^\\| `([a-z-]+)` \\|").FindAllStringSubmatch(section, -1) {
		documented = append(documented, m[1])
	}
	if got := slices.Compact(has); !slices.Equal(got, documented) {
		t.Errorf("the plugin has the requirements %q, docs/operating.md %q", got, documented)
	}
}
