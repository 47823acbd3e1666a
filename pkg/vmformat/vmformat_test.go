// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package vmformat

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/health"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/vmformat/guest"
)

// good returns the outcome of a VM that did its work.
func good() outcome {
	return outcome{
		orders: []*order{{ctx: context.Background()}}, timeout: DefaultTimeout,
		events:  events{shutdown: reasonGuestShutdown},
		verdict: guest.Verdict{Nonce: "n", OK: true, Stage: guest.StageDone},
	}
}

// TestJudge takes one witness at a time away from a good outcome. Without it the outcome must
// be a failure.
func TestJudge(t *testing.T) {
	if err := good().judge(); err != nil {
		t.Fatalf("a good outcome is judged %v", err)
	}
	for name, c := range map[string]struct {
		spoil func(*outcome)
		words []string
	}{
		"exit code":            {func(o *outcome) { o.exit = &exec.ExitError{ProcessState: &os.ProcessState{}} }, []string{"QEMU ended with an error", "exit status 0"}},
		"not started":          {func(o *outcome) { o.exit = errors.New("exec format error") }, []string{"QEMU could not be started", "exec format error"}},
		"deadline":             {func(o *outcome) { o.exit, o.timedOut = errors.New("signal: killed"), true }, []string{"deadline of 1m40s", "--format-timeout"}},
		"guest reset":          {func(o *outcome) { o.events.shutdown = "guest-reset" }, []string{"guest-reset", "--kernel"}},
		"panic":                {func(o *outcome) { o.events.shutdown, o.panic = "guest-reset", "Kernel panic - x" }, []string{"Kernel panic - x"}},
		"no shutdown event":    {func(o *outcome) { o.events.shutdown = "" }, []string{"crashed"}},
		"host shutdown":        {func(o *outcome) { o.events.shutdown = "host-signal" }, []string{"host-signal"}},
		"no verdict":           {func(o *outcome) { o.verdict, o.noVerdict = guest.Verdict{}, guest.ErrNoVerdict }, []string{"without its verdict"}},
		"verdict of failure":   {func(o *outcome) { o.verdict.OK = false; o.verdict.Stage = guest.StageMkfs; o.verdict.ExitCode = 3 }, []string{"mkfs failed", "exit code 3"}},
		"missing library":      {func(o *outcome) { o.verdict.OK = false; o.verdict.ExitCode = 127 }, []string{"reinstall its package"}},
		"stage":                {func(o *outcome) { o.verdict.Stage = guest.StageCheck }, []string{`stage "check"`}},
		"check wrote":          {func(o *outcome) { o.verdict.Written = 8 }, []string{"8 sectors written"}},
		"disk error":           {func(o *outcome) { o.events.ioError = &ioFail{operation: "write", reason: "EIO"} }, []string{"disk write failed", "EIO"}},
		"monitor":              {func(o *outcome) { o.monitor = io.ErrUnexpectedEOF }, []string{"monitor"}},
		"canceled":             {func(o *outcome) { o.canceled = context.Canceled }, []string{"canceled"}},
		"a false OK when full": {func(o *outcome) { o.events.ioError = &ioFail{operation: "write", noSpace: true} }, []string{"no space left for the image", "free space on its filesystem"}},
	} {
		t.Run(name, func(t *testing.T) {
			o := good()
			c.spoil(&o)
			o.console = []string{"the last line"}
			err := o.judge()
			if !errors.Is(err, ErrFormat) {
				t.Fatalf("it is judged %v, want ErrFormat", err)
			}
			for _, w := range c.words {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("%q lacks %q", err, w)
				}
			}
			if o.canceled != nil && strings.Contains(err.Error(), "the last line") {
				t.Errorf("%q shows the console to those who canceled", err)
			}
		})
	}
}

func TestLastLines(t *testing.T) {
	c := &console{progress: func(guest.Progress, int) {}}
	for i := range 50 {
		fmt.Fprintf(c, "line %d\r\n\n", i)
	}
	fmt.Fprint(c, "Kernel panic - not syncing: x\n", strings.Repeat("y", 5000))
	lines, panicLine := c.last()
	if len(lines) != consoleLines || lines[0] != "line 32" || panicLine != "Kernel panic - not syncing: x" || len(lines[consoleLines-1]) != consoleWidth {
		t.Errorf("kept %d lines from %q, panic %q", len(lines), lines[0], panicLine)
	}
}

func TestChooseAccel(t *testing.T) {
	works, fails := func() error { return nil }, func() error { return errors.New("no vmx") }
	for _, c := range []struct {
		want   Accel
		usable func() error
		got    Accel
		err    error
	}{
		{AccelAuto, works, AccelKVM, nil},
		{AccelAuto, fails, AccelTCG, nil},
		{AccelKVM, works, AccelKVM, nil},
		{AccelKVM, fails, "", ErrUnavailable},
		{AccelTCG, works, AccelTCG, nil},
	} {
		got, err := chooseAccel(c.want, c.usable)
		if got != c.got || !errors.Is(err, c.err) {
			t.Errorf("%s: chose %q, %v, want %q, %v", c.want, got, err, c.got, c.err)
		}
	}
	if _, err := New(Config{Accel: "hvf"}); err == nil || !strings.Contains(err.Error(), "auto, kvm, tcg") {
		t.Errorf("accelerator hvf: %v", err)
	}
}

// TestMachines checks that every machine has both accelerators, and that an unknown
// architecture is one clear error.
func TestMachines(t *testing.T) {
	for arch, m := range machines {
		for _, a := range []Accel{AccelKVM, AccelTCG} {
			if m.accelerators[a].accel == "" {
				t.Errorf("%s has no accelerator %s", arch, a)
			}
		}
	}
	_, err := machineOf("riscv64")
	if want := "formatter unavailable: there is no formatting VM for the architecture riscv64; run it on amd64"; !errors.Is(err, ErrUnavailable) || err.Error() != want {
		t.Errorf("riscv64: %v, want %q", err, want)
	}
}

// TestSameCommandLine checks that KVM gets the command line that the other tests run under
// TCG, except for the accelerator itself.
func TestSameCommandLine(t *testing.T) {
	line := func(a Accel) string {
		v := vm{machine: amd64, accel: amd64.accelerators[a], memory: 256, werror: "stop", caged: true}
		return strings.Join(v.args(&inherited{templates: 1, control: 4, qmp: 5}), " ")
	}
	kvm, tcg := line(AccelKVM), line(AccelTCG)
	tcg = strings.Replace(tcg, "-accel tcg,thread=multi,tb-size=128 -cpu max", "-accel kvm -cpu host", 1)
	tcg = regexp.MustCompile(` tsc_early_khz=\d+`).ReplaceAllString(tcg, "")
	if tcg != kvm {
		t.Errorf("kvm: %s\ntcg: %s", kvm, tcg)
	}
}

// ignored is for what else QEMU says.
func ignored(m qmpMessage) error { return m.failure() }

// TestMonitor plays QEMU, with a greeting, an answer and events.
func TestMonitor(t *testing.T) {
	ours, theirs := net.Pipe()
	type result struct {
		ev  events
		err error
	}
	done := make(chan result, 1)
	go func() {
		ev, err := monitor(ours, ignored)
		done <- result{ev, err}
	}()
	say := func(s string) { fmt.Fprintln(theirs, s) }
	hear := func(want string) {
		t.Helper()
		b := make([]byte, 200)
		n, err := theirs.Read(b)
		if err != nil || !strings.Contains(string(b[:n]), want) {
			t.Errorf("heard %q, %v, want %q", b[:n], err, want)
		}
	}
	say(`{"QMP": {"version": {}, "capabilities": []}}`)
	hear(`"qmp_capabilities"`)
	say(`{"return": {}}`)
	say(`{"timestamp": {}, "event": "BLOCK_IO_ERROR", "data": {"operation": "write", "nospace": true, "reason": "No space left on device"}}`)
	hear(`"quit"`)
	say(`{"event": "SHUTDOWN", "data": {"guest": false, "reason": "host-qmp-quit"}}`)
	theirs.Close()
	r := <-done
	if r.err != nil || r.ev.shutdown != "host-qmp-quit" || r.ev.ioError == nil || !r.ev.ioError.noSpace {
		t.Errorf("the monitor returned %+v", r)
	}
}

func TestMonitorError(t *testing.T) {
	for _, said := range []string{`{"error": {"class": "GenericError", "desc": "bad command"}}`, `garbage`} {
		rw := struct {
			io.Reader
			io.Writer
		}{strings.NewReader(said), io.Discard}
		if _, err := monitor(rw, ignored); err == nil {
			t.Errorf("%s: no error", said)
		}
	}
}

// endless repeats a text for ever, and counts the bytes that were read.
type endless struct {
	text []byte
	read int
}

func (e *endless) Read(b []byte) (int, error) {
	n := copy(b, e.text[e.read%len(e.text):])
	e.read += n
	return n, nil
}

// TestMonitorEnds checks that a QEMU that never stops talking is cut off.
func TestMonitorEnds(t *testing.T) {
	e := &endless{text: []byte(`{"return": {}} `)}
	if hear(e); e.read != maxMonitor {
		t.Errorf("%d bytes were read, want %d", e.read, maxMonitor)
	}
}

// TestMissingNamesPackage takes each part of the VM away. The operator must read which package
// has it.
func TestMissingNamesPackage(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	oldTools, oldBoot := toolDirs, bootDir
	toolDirs, bootDir = nil, t.TempDir()
	defer func() { toolDirs, bootDir = oldTools, oldBoot }()
	f, err := New(Config{Accel: AccelTCG})
	if err != nil {
		t.Fatal(err)
	}
	conditions := f.Conditions()
	missing := health.Err(conditions)
	if missing == nil {
		t.Fatal("nothing is missing")
	}
	t.Log(missing)
	var parts []string
	for _, c := range conditions {
		parts = append(parts, c.Object)
	}
	if distinct := slices.Compact(slices.Sorted(slices.Values(parts))); len(distinct) != len(parts) {
		t.Errorf("parts %v have one name", parts)
	}
	if len(conditions) != 2+2*len(diskfs.Names()) { // QEMU, the kernel, mkfs and checkers
		t.Errorf("%d conditions", len(conditions))
	}
	for _, c := range conditions {
		if c.Code != "FormatterUnavailable" || c.Severity != health.Degraded || !strings.Contains(c.Message(), "install the package") {
			t.Errorf("condition %+v", c)
		}
	}
	for _, w := range []string{"qemu-system-x86", "linux-image-cloud-amd64", "mkfs.ext4", "e2fsprogs", "mkfs.xfs", "xfsprogs", "mkfs.btrfs", "btrfs-progs"} {
		if !strings.Contains(missing.Error(), w) {
			t.Errorf("the message lacks %q", w)
		}
	}
	for _, fs := range diskfs.Names() {
		spec := diskfs.Spec{Filesystem: fs, Size: 1 << 30}
		if _, err := f.Fingerprint(spec, nil); !errors.Is(err, ErrUnavailable) {
			t.Errorf("%s: %v, want ErrUnavailable", fs, err)
		}
	}
}

// TestExtendFails has an image that cannot get its size. Whoever reads that knows the size, and
// not the name, if there is one.
func TestExtendFails(t *testing.T) {
	readOnly, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer readOnly.Close()
	err = extend(readOnly, 300<<20)
	if want := "formatting failed: extending the image to 300Mi: invalid argument"; !errors.Is(err, ErrFormat) || !errors.Is(err, syscall.EINVAL) || err.Error() != want {
		t.Errorf("%v, want %s", err, want)
	}
}

func TestFormatChecksSpecFirst(t *testing.T) {
	f, err := New(Config{Timeout: time.Second})
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.Format(t.Context(), nil, diskfs.Spec{Filesystem: "ext4", Size: 1 << 60}, nil, nil)
	if !errors.Is(err, diskfs.ErrOutOfRange) {
		t.Errorf("%v, want ErrOutOfRange", err)
	}
}
