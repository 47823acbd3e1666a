// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package vmformat

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/cage"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/vmformat/guest"
)

// outcome is everything that was seen of one VM's run. [outcome.of] adds one order's verdict.
type outcome struct {
	orders   []*order
	start    time.Time
	restored bool          // it did not boot
	saved    bool          // it was saved
	ready    time.Duration // from the start until the guest was told to go on
	control  []byte        // the control disk at the end; nil if it could not be read

	timeout  time.Duration
	exit     error // nil: QEMU exited with 0
	timedOut bool  // killed at the deadline
	stuck    bool  // killed at that of its boot, with time left
	canceled error // why the caller gave up; nil if it did not
	events   events
	monitor  error    // failure of the monitor's connection
	console  []string // last lines printed
	panic    string   // the kernel's reason, if it printed one
	elapsed  time.Duration

	verdict   guest.Verdict
	noVerdict error // why there is no verdict; nil if there is one
}

// of returns the outcome for one order.
func (o outcome) of(i int) outcome {
	order := o.orders[i]
	if err := context.Cause(order.ctx); err != nil {
		o.canceled = err
	}
	if o.control == nil {
		o.noVerdict = fmt.Errorf("%w: the disk with it cannot be read", guest.ErrNoVerdict)
		return o
	}
	at := guest.VerdictAt(i)
	o.verdict, o.noVerdict = guest.ParseVerdict(o.control[at:at+guest.VerdictSize], order.nonce)
	return o
}

// onceMore tells whether an order whose outcome is a failure gets a VM of its own that boots. That
// is so if the VM failed, and not mkfs or a check, and if others in the VM, or its being restored,
// may have been the cause. One that hangs while it boots is tried again once: under TCG a kernel was seen
// to stop after 0.3 s, on a machine with a load of 40.
func (o outcome) onceMore() bool {
	refused := o.noVerdict == nil && !o.verdict.OK
	return o.canceled == nil && !errors.Is(o.exit, cage.ErrBuild) && !refused && (o.restored || len(o.orders) > 1 || o.stuck && !o.orders[0].again)
}

// report says how an order was carried out, as far as the VM goes.
func (o outcome) report(order *order, v *vm) Report {
	return Report{
		Fingerprint: fingerprint(v.base, order.job),
		UUID:        o.verdict.UUID,
		Kernel:      o.verdict.Kernel,
		Mkfs:        o.verdict.Mkfs,
		Accelerator: v.accel.name,
		Restored:    o.restored,
		Boot:        o.ready,
		Disks:       o.orders[0].entered.Sub(o.start) - o.ready,
		Make:        time.Duration(o.verdict.MkfsMS) * time.Millisecond,
		Unpack:      time.Duration(o.verdict.UnpackMS) * time.Millisecond,
		Check:       time.Duration(o.verdict.CheckMS) * time.Millisecond,
		Elapsed:     o.elapsed,
		Entries:     o.verdict.Entries,
		Bytes:       o.verdict.Bytes,
	}
}

// judge returns nil only if every witness agrees: QEMU exited with 0 and in time, the guest
// powered itself off, no disk ever failed, and the guest's verdict carries this run's nonce
// and says OK. No single witness is enough: QEMU exits with 0 also when the guest's kernel
// panics, and a guest on a full disk may believe that it succeeded.
//
// judge reports the cause that came first, since it explains the others.
func (o outcome) judge() error {
	switch {
	case o.canceled != nil:
		o.console = nil // it tells nothing to those who ended it themselves
		return o.failed("canceled", o.canceled)
	case errors.Is(o.exit, cage.ErrBuild):
		return fmt.Errorf("%w: %w", ErrUnavailable, o.exit)
	case o.events.ioError != nil:
		e := o.events.ioError
		if e.noSpace {
			return fmt.Errorf("%w: %w: a disk %s of the VM did not fit; free space on its filesystem or enlarge that, then try again",
				ErrFormat, ErrNoSpace, e.operation)
		}
		return o.failed(fmt.Sprintf("a disk %s failed: %s; look in the kernel log for errors of the pool's disk", e.operation, e.reason), nil)
	case o.timedOut:
		return o.failed(fmt.Sprintf("the VM was killed at its deadline of %s; if the node is loaded, give a longer --format-timeout", o.timeout), nil)
	case o.exit != nil && !errors.As(o.exit, new(*exec.ExitError)):
		return o.failed("QEMU could not be started", o.exit)
	case o.exit != nil:
		return o.failed("QEMU ended with an error; its output is below", o.exit)
	case o.noVerdict == nil && !o.verdict.OK:
		return o.refused()
	case o.events.shutdown != reasonGuestShutdown:
		why := o.panic
		if why == "" {
			why = "it printed no reason; the kernel image may be damaged or the memory too small"
		}
		return o.failed(fmt.Sprintf("the guest's kernel crashed or its init ended early (QMP shutdown reason %q, not %q): %s; try another --kernel",
			o.events.shutdown, reasonGuestShutdown, why), o.noVerdict)
	case o.noVerdict != nil:
		return o.failed("the VM powered off without its verdict", o.noVerdict)
	case o.verdict.Stage != guest.StageDone || o.verdict.Written != 0:
		return o.failed(fmt.Sprintf("the verdict says OK, but at stage %q with %d sectors written by the check, where it must be stage %q and 0 sectors",
			o.verdict.Stage, o.verdict.Written, guest.StageDone), nil)
	case o.monitor != nil:
		return o.failed("the connection to QEMU's monitor broke", o.monitor)
	}
	return nil
}

// refused returns the failure that the guest itself reports.
func (o outcome) refused() error {
	v := o.verdict
	if v.Full != "" {
		return o.tooSmall()
	}
	what := fmt.Sprintf("%s failed: %s", v.Stage, v.Error)
	if v.ExitCode != 0 {
		what = fmt.Sprintf("%s failed with exit code %d: %s", v.Stage, v.ExitCode, v.Error)
	}
	if v.ExitCode == 127 {
		what += "; the program could not be started: see below which library is missing, and reinstall its package"
	}
	if v.Output != "" {
		o.console = lastLines(v.Output, consoleLines)
	}
	return o.failed(what, nil)
}

// failed returns the error that the operator reads: what failed, why, and the VM's last lines.
func (o outcome) failed(what string, cause error) error {
	var tail string
	if len(o.console) > 0 {
		tail = fmt.Sprintf("\nlast lines of the VM:\n  %s", strings.Join(o.console, "\n  "))
	}
	if cause != nil {
		return fmt.Errorf("%w after %s: %s: %w%s", ErrFormat, o.elapsed.Round(time.Millisecond), what, cause, tail)
	}
	return fmt.Errorf("%w after %s: %s%s", ErrFormat, o.elapsed.Round(time.Millisecond), what, tail)
}

func lastLines(s string, n int) []string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return lines[max(0, len(lines)-n):]
}

// noSpace adds ErrNoSpace to an error if the kernel's reason is a full disk or quota.
func noSpace(err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return fmt.Errorf("%w: %w", ErrNoSpace, err)
	}
	return err
}
