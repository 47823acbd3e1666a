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
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/csi-disktemplate/csi-disktemplate/internal/failpoint"
	"github.com/csi-disktemplate/csi-disktemplate/internal/harness"
	"github.com/csi-disktemplate/csi-disktemplate/internal/harness/harnesstest"
	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/process"
)

// count returns how often something is done: COUNT from the environment, or a number that suits every run.
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

// thorough is set for those who have the time: make torture sets COUNT.
var thorough = os.Getenv("COUNT") != ""

// seeded returns the source of everything that is random in a test. Its seed is printed, so that the test can be repeated.
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
	fmt.Printf("%s: SEED=%d\n", t.Name(), seed) // also if the test passes
	return rand.New(rand.NewPCG(seed, 0))
}

// node is a node whose plugin ends, or fails, where a plan says so.
type node struct {
	harness.Node
	t    *testing.T
	race bool   // the plugin has the race detector
	base base   // what the pool is on
	fail string // the directory of plans for the failpoints
	boot string // the id of the boot that the plugin believes in; "" is the kernel's
	plan int
	*contents
	empty []string // the templates without a content, by their files' names
	// How many volatile volumes were made again after power cuts.
	emptied int
	// What power cuts left of contents: blobs, and templates that were built once more, since their build was not answered.
	leftBlobs, unfinished int
	// How many goldens power cuts had to leave, and how many volumes they left that waited for their commit.
	leftGoldens, leftCommits int
	onlyJobs                 bool // workers do nothing else
	// How often a claim could not be used because a neighbour had filled the disk.
	setbacks atomic.Int64
	// One connection outlives all plugins, as a sidecar's does.
	*harness.Client
	*harness.Plugin

	mu   sync.Mutex
	logs []string // the paths of all plugins' logs
}

// logged reports whether a plugin has logged a line that has all of some words.
func (n *node) logged(words ...string) (bool, error) {
	n.mu.Lock()
	logs := slices.Clone(n.logs)
	n.mu.Unlock()
	for _, path := range logs {
		log, err := os.ReadFile(path)
		if err != nil {
			return false, err
		}
		for line := range strings.Lines(string(log)) {
			if !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(line, w) }) {
				return true, nil
			}
		}
	}
	return false, nil
}

// base is what a pool is on.
type base struct {
	name string
	kind testenv.Kind // of the filesystem that holds the pool
	// loopback is for a pool in a file on that filesystem. A neighbour fills it now and then.
	loopback bool
	// ready is how many volumes the plugin keeps ready. Where effects are counted it is 0: those of
	// making volumes ready would be among them.
	ready int
	turn  int // see [kinds]
}

var (
	onXFS      = base{name: "xfs", kind: testenv.XFS}
	onBtrfs    = base{name: "btrfs", kind: testenv.Btrfs, turn: 1}
	inLoopback = base{name: "loopback", kind: testenv.Ext4, loopback: true}
)

// keepingReady is a base whose plugin keeps volumes ready.
func (b base) keepingReady() base {
	b.ready = 8
	return b
}

// pool is the directory of the images, on a filesystem that is mounted already.
func (b base) pool(mounted string) string {
	if b.loopback {
		return filepath.Join(mounted, "pool", "mnt")
	}
	return filepath.Join(mounted, "pool")
}

// flags are those of a plugin with a pool in such a directory.
func (b base) flags(pool string) []string {
	flags := append([]string{"--warm", "1", "--warm-max", fmt.Sprint(b.ready)}, harness.AnyPort...)
	if b.loopback {
		return append(flags, "--pool", filepath.Dir(pool), "--loopback-pool-size", "8Gi", "--trim-interval", "1s")
	}
	return append(flags, "--trim-interval", "0", "--trial-interval", "0") // their effects would be among those that are counted
}

// unmount unmounts a loopback pool.
func (b base) unmount(t *testing.T, mounted string) {
	t.Helper()
	at := b.pool(mounted)
	if _, err := os.Lstat(at); err == nil && b.loopback && testenv.IsMounted(t, at) {
		testenv.NoLoopsBelow(t, at)
		testenv.Umount(t, at)
	}
}

var kernelError = regexp.MustCompile(`(?i)error|abort|shut|lost|corrupt`)

// kernelErrors tells why a filesystem gave up.
func kernelErrors() string {
	out, err := exec.Command("dmesg").CombinedOutput()
	if err != nil {
		return fmt.Sprintf("dmesg: %v: %s", err, out)
	}
	lines := slices.DeleteFunc(strings.Split(string(out), "\n"), func(line string) bool { return !kernelError.MatchString(line) })
	return strings.Join(lines[max(0, len(lines)-60):], "\n")
}

// newNode makes a node whose pool is on a filesystem that is mounted already.
func newNode(t *testing.T, b base, mounted string) *node {
	t.Helper()
	t.Cleanup(func() { b.unmount(t, mounted) })
	n := &node{t: t, base: b, fail: t.TempDir(), Node: harnesstest.New(t, b.pool(mounted)), contents: newContents(t)}
	n.Client = harnesstest.Connect(t, n.Node)
	t.Cleanup(func() {
		if n.Plugin != nil {
			n.kill()
			if t.Failed() {
				t.Logf("the end of the last plugin's log:\n%s", n.Tail())
				t.Logf("the last errors in the kernel's log, of whatever device:\n%s", kernelErrors())
			}
		}
	})
	return n
}

// launch starts the plugin and does not wait.
func (n *node) launch() {
	n.t.Helper()
	n.Plugin = harnesstest.Launch(n.t, n.Node, harness.Command{
		Binary: testenv.FailingBinary(n.t, n.race), ID: "node",
		Flags: append([]string{"--accel", "tcg", "--headroom", "0", "--goldens"}, append(n.contents.flags(), n.base.flags(n.Pool)...)...),
		Env:   []string{failpoint.Env + "=" + n.fail, failpoint.InitEnv + "=" + testenv.Binary(n.t), failpoint.BootEnv + "=" + n.boot, "GORACE=halt_on_error=1 exitcode=66"},
	})
	n.mu.Lock()
	defer n.mu.Unlock()
	n.logs = append(n.logs, n.Log)
}

// serves waits until the plugin serves, or returns why it does not.
func (n *node) serves() error {
	ctx, cancel := context.WithTimeout(context.Background(), harness.CallTimeout)
	defer cancel()
	return n.Serves(ctx, n.Client)
}

// start starts the plugin and waits until it serves.
func (n *node) start() {
	n.t.Helper()
	n.launch()
	n.must("starting", n.serves())
}

// kill ends the plugin by SIGKILL, if that has not happened yet.
func (n *node) kill() {
	n.t.Helper()
	n.Kill()
	n.mustBeKilled()
}

// mustBeKilled waits for the end of the plugin. SIGKILL must be its cause, and not a panic or a data race.
func (n *node) mustBeKilled() {
	n.t.Helper()
	if s, ok := n.State().Sys().(syscall.WaitStatus); !ok || !s.Signaled() || s.Signal() != syscall.SIGKILL {
		n.t.Fatalf("the plugin ended with %v:\n%s", n.State(), n.Tail())
	}
}

// killed reports whether a call failed because the plugin was killed.
func (n *node) killed(err error) bool {
	n.t.Helper()
	if status.Code(err) != codes.Unavailable {
		return false
	}
	select {
	case <-n.Exited():
		n.mustBeKilled()
		return true
	case <-time.After(10 * time.Second):
		return false
	}
}

// arm has the plugin be killed, or get an error, at its at-th effect from now on.
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

// volumes lists what there is of volumes: images, loop devices, mounts, and processes that hold a half-made file. It also
// lists volumes that wait for their commit, and blobs that are not whole.
func (n *node) volumes() string {
	n.t.Helper()
	found := append(harnesstest.Find(n.t, n.Node), n.kept()...)
	for _, dir := range []string{"volumes", "snapshots", "templates", "goldens", "cache/blobs"} {
		holders, err := process.HoldingUnnamed(filepath.Join(n.Pool, dir))
		if err != nil {
			n.t.Fatal(err)
		}
		for _, h := range holders {
			// The plugin has unnamed volumes, which are ready, and parts of blobs. Of templates it has none but in a
			// build, and of goldens none but in a commit.
			if n.Plugin == nil || h.PID != n.PID() || dir == "templates" || dir == "goldens" {
				found = append(found, fmt.Sprintf("process %d with %s", h.PID, h.File))
			}
		}
	}
	return strings.Join(append(found, n.tornBlobs()...), " ")
}

// kept lists the volumes that wait for their commit.
func (n *node) kept() (names []string) {
	n.t.Helper()
	entries, err := os.ReadDir(filepath.Join(n.Pool, "commits"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		n.t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, "commits/"+e.Name())
	}
	return names
}

// mustHave compares the volumes with what there should be.
func (n *node) mustHave(when, want string) {
	n.t.Helper()
	if got := harnesstest.Settles(n.volumes, want); got != want {
		n.t.Fatalf("%s: there is %q, expected %q\n%s", when, got, want, n.Tail())
	}
}

// mustEnd kills the plugin, with which all must end that it kept ready.
func (n *node) mustEnd() {
	n.t.Helper()
	n.kill()
	ready := func() string {
		found, err := n.Find()
		n.must("looking for what is left", err)
		return strings.Join(append(found.List(), found.Ready...), " ")
	}
	if left := harnesstest.Settles(ready, ""); left != "" {
		n.t.Fatalf("with the plugin all must end that it kept ready; there is %s", left)
	}
}

// must ends the test with an error.
func (n *node) must(what string, err error) {
	n.t.Helper()
	if err != nil {
		n.t.Fatalf("%s: %v\n%s", what, err, n.Tail())
	}
}

// onPools runs a test on pools on each base, with all templates built and, if wanted, with the race detector.
func onPools(t *testing.T, race bool, test func(n *node), bases ...base) {
	onNewPools(t, race, func(n *node) {
		n.warm()
		test(n)
	}, bases...)
}

// onNewPools is onPools for a test that builds its own templates.
func onNewPools(t *testing.T, race bool, test func(n *node), bases ...base) {
	if bases == nil {
		bases = []base{onXFS, onBtrfs}
	}
	for _, b := range bases {
		t.Run(b.name, func(t *testing.T) {
			n := newNode(t, b, b.kind.Mount(t, 6<<30))
			n.race = race
			n.start()
			test(n)
			n.mustEnd()
		})
	}
}

// warm has every template built.
func (n *node) warm() {
	n.t.Helper()
	for fs := range sizes {
		d := inline("warm-"+fs, fs, "filesystem")
		n.must("building a template", n.run(publish(d), unpublish(d)))
		n.must("removing its pod", os.RemoveAll(n.podDir(d)))
	}
	n.mustHave("after building the templates", "")
	n.empty = n.templates()
}
