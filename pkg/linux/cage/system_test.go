// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package cage

import (
	"bytes"
	"fmt"
	"io"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
)

const uid = 65500

// sh runs a shell script in a cage that has /usr. The script begins when its limits are
// set, which happens while the shell runs already. If they never are, it begins after
// some seconds without them.
func sh(t *testing.T, script string, change func(*Spec)) (string, error) {
	t.Helper()
	testenv.Root(t)
	s := Spec{
		UID: uid, GID: uid,
		Binds:    map[string]string{"/usr": "/usr"},
		Symlinks: map[string]string{"/lib": "usr/lib", "/lib64": "usr/lib64", "/bin": "usr/bin"},
		Files:    map[string]io.ReadCloser{"/given": io.NopCloser(strings.NewReader("content"))},
	}
	if change != nil {
		change(&s)
	}
	cmd := exec.Command("/usr/bin/sh", "-c", "until "+limited(s.Limits)+" || [ $((tries += 1)) -gt 5000 ]; do :; done; "+script)
	cmd.Env = []string{"PATH=/usr/bin"}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := Run(cmd, s)
	return out.String(), err
}

// limited is a shell's condition: that the shell has the limits.
func limited(l Limits) string {
	is := func(flag string, value int64) string { return fmt.Sprintf(`[ "$(ulimit -H %s)" = %d ]`, flag, value) }
	all := []string{is("-c", 0)}
	if l.Memory > 0 {
		all = append(all, is("-v", l.Memory>>10))
	}
	if l.CPU > 0 {
		all = append(all, is("-t", int64(math.Ceil(l.CPU.Seconds()))))
	}
	if l.Files > 0 {
		all = append(all, is("-n", int64(l.Files)))
	}
	return strings.Join(all, " && ")
}

func TestInside(t *testing.T) {
	for name, c := range map[string]struct{ script, want string }{
		"what is there":         {"cd /; echo *", "bin dev given lib lib64 usr"},
		"devices":               {"cd /dev; echo *", "null"},
		"given file":            {"cat /given", "content"},
		"who":                   {"id -u; id -g; id -G", "65500\n65500\n65500"},
		"process id":            {"echo $$", "1"},
		"no proc":               {"test -e /proc || echo none", "none"},
		"root is read-only":     {"touch /x 2>&1", "touch: cannot touch '/x': Read-only file system"},
		"given is read-only":    {"echo y 2>/dev/null >>/given || echo refused", "refused"},
		"no new privileges":     {"setpriv --dump | grep no_new_privs", "no_new_privs: 1"},
		"no capabilities":       {"unshare --mount true 2>/dev/null || echo refused", "refused"},
		"set-uid has no effect": {"su -c id 2>/dev/null || echo refused", "refused"},
	} {
		t.Run(name, func(t *testing.T) {
			out, _ := sh(t, c.script, nil)
			if got := strings.TrimSpace(out); got != c.want {
				t.Errorf("%s: got %q, want %q", c.script, got, c.want)
			}
		})
	}
}

// TestLimits runs programs that ask for more than they may have.
func TestLimits(t *testing.T) {
	for name, c := range map[string]struct {
		limits       Limits
		script, want string
	}{
		"as the program sees them": {Limits{Memory: 1 << 30, CPU: 1500 * time.Millisecond, Files: 20}, "ulimit -v; ulimit -t; ulimit -n; ulimit -c", "1048576\n2\n20\n0"},
		"raised by itself":         {Limits{Memory: 1 << 30}, "ulimit -v 1048577 2>/dev/null || echo refused", "refused"},
		"none":                     {Limits{}, "ulimit -v; ulimit -t; ulimit -c", "unlimited\nunlimited\n0"},
		"memory":                   {Limits{Memory: 256 << 20}, "head -c 512M /dev/zero | tail -c 511M 2>&1 >/dev/null | head -n 1", "tail: memory exhausted"},
		"files":                    {Limits{Files: 5}, "(exec 3</given 4</given 5</given) 2>/dev/null || echo refused", "refused"},
	} {
		t.Run(name, func(t *testing.T) {
			out, err := sh(t, c.script, func(s *Spec) {
				s.Limits = c.limits
				s.Devices = []string{"/dev/zero"}
			})
			if got := strings.TrimSpace(out); got != c.want {
				t.Errorf("%s: got %q, want %q: %v", c.script, got, c.want, err)
			}
		})
	}
	t.Run("processor", func(t *testing.T) {
		_, err := sh(t, "trap '' XCPU; while :; do :; done", func(s *Spec) { s.Limits.CPU = time.Second })
		if err == nil || err.Error() != "signal: killed" {
			t.Errorf("a program that runs for ever ended with %v", err)
		}
	})
}

// TestUmask: a hardened root shell has umask 077, and another user must read what is in
// the cage.
func TestUmask(t *testing.T) {
	defer syscall.Umask(syscall.Umask(0o077))
	out, err := sh(t, "cat /given && head -c 1 /dev/zero | od -An -tx1", func(s *Spec) { s.Devices = []string{"/dev/zero"} })
	if err != nil || strings.TrimSpace(out) != "content 00" {
		t.Errorf("with umask 077, the cage printed %q: %v", out, err)
	}
	if got := syscall.Umask(0o077); got != 0o077 {
		t.Errorf("the umask of the process is %#o now", got)
	}
}

func TestNoNetwork(t *testing.T) {
	script := `perl -MSocket -e 'socket(S,PF_INET,SOCK_DGRAM,0) or die; connect(S,sockaddr_in(9,inet_aton("127.0.0.1"))) and print "reached"; print $!'`
	if out, _ := sh(t, script, nil); !strings.Contains(out, "unreachable") {
		t.Errorf("connecting to 127.0.0.1: %q", out)
	}
}

// TestDeviceModes gives the user in the cage device nodes of different modes outside.
func TestDeviceModes(t *testing.T) {
	dir := testenv.Dir(t)
	for _, mode := range []string{"600", "660", "000"} {
		dev := filepath.Join(dir, "zero"+mode)
		testenv.Run(t, "mknod", "-m", mode, dev, "c", "1", "5")
		out, err := sh(t, "head -c 4 "+dev+" | od -An -tx1", func(s *Spec) { s.Devices = []string{dev} })
		if err != nil || strings.TrimSpace(out) != "00 00 00 00" {
			t.Errorf("mode %s: the cage printed %q: %v", mode, out, err)
		}
		if fi, err := os.Stat(dev); err != nil || fi.Mode().Perm().String() != map[string]string{"600": "-rw-------", "660": "-rw-rw----", "000": "----------"}[mode] {
			t.Errorf("the machine's own node has mode %v now: %v", fi.Mode(), err)
		}
	}
}

// TestHoldsNoMount looks at a running cage for a mount of the machine.
func TestHoldsNoMount(t *testing.T) {
	at := testenv.Tmpfs(t)
	done := make(chan error, 1)
	in, end, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		end.Close()
		<-done
		in.Close()
	}()
	go func() {
		cmd := exec.Command("/usr/bin/sh", "-c", "read x")
		cmd.Stdin = in
		done <- Run(cmd, Spec{UID: uid, GID: uid, Binds: map[string]string{"/usr": "/usr"},
			Symlinks: map[string]string{"/lib": "usr/lib", "/lib64": "usr/lib64"}})
	}()
	var tables []string
	testenv.Eventually(t, "the mount table of the cage to appear", func() bool {
		tables = mountTables(t, "/usr")
		return len(tables) > 0
	})
	for _, table := range tables {
		if strings.Contains(table, at) {
			t.Errorf("the cage holds %s:\n%s", at, table)
		}
	}
}

// mountTables returns the mount tables of the processes in a cage: those that
// have a mount at the given path and a root that is a read-only tmpfs.
func mountTables(t *testing.T, with string) []string {
	t.Helper()
	names, err := filepath.Glob("/proc/[0-9]*/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	var tables []string
	for _, name := range names {
		b, err := os.ReadFile(name)
		table := string(b)
		root, _, _ := strings.Cut(table, "\n")
		if err == nil && strings.Contains(root, " / / ro,nosuid") && strings.Contains(root, "tmpfs") && strings.Contains(table, " "+with+" ") {
			tables = append(tables, table)
		}
	}
	return tables
}

// TestMainThread: the process keeps its namespaces, whichever thread builds a cage.
func TestMainThread(t *testing.T) {
	namespace := func(of string) string {
		at, err := os.Readlink("/proc/" + of + "/ns/mnt")
		if err != nil {
			t.Fatal(err)
		}
		return at
	}
	want := namespace(strconv.Itoa(os.Getppid()))
	for range 20 {
		if _, err := sh(t, "true", nil); err != nil {
			t.Fatal(err)
		}
		if got := namespace("self"); got != want {
			t.Fatalf("the process is in %s, its parent in %s", got, want)
		}
	}
}

func TestMissingBind(t *testing.T) {
	if _, err := sh(t, "true", func(s *Spec) { s.Binds["/x"] = "/nonexistent" }); err == nil || !strings.Contains(err.Error(), "/nonexistent") {
		t.Errorf("a bind of a path that does not exist: %v", err)
	}
}

// TestBesideForks builds cages while other threads start processes: a child has a
// copy of every descriptor until its execve, and one that is open for writing would
// keep the cage's root from becoming read-only.
func TestBesideForks(t *testing.T) {
	testenv.Root(t)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					exec.Command("true").Run()
				}
			}
		})
	}
	for range 50 {
		spec := System()
		spec.UID, spec.GID = 65500, 65500
		spec.Files["/large"] = io.NopCloser(bytes.NewReader(make([]byte, 4<<20)))
		if err := Run(exec.Command("/usr/bin/true"), spec); err != nil {
			t.Error(err)
			break
		}
	}
	close(stop)
	wg.Wait()
}
