// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// warm builds the templates that the cases use, and measures the plugin's memory after the first one: that build also
// unpacks the VM's kernel into the pool.
func (b *bench) warm(ctx context.Context, d *bed) error {
	for i, fs := range filesystems {
		if err := b.once(ctx, d, plugin, d.volume(fs, volumeSize)); err != nil {
			return err
		}
		if i > 0 {
			continue
		}
		peak, err := d.memory("VmHWM")
		if err != nil {
			return err
		}
		b.add(key{Case: "memory", Pool: d.kind.name, What: "HWM, first build", Way: plugin}, peak)
	}
	return nil
}

// memory measures a plugin that has just started and builds one template.
func memory(ctx context.Context, b *bench, d *bed) error {
	for i, fs := range filesystems {
		if err := d.restart(ctx, b.o.binary); err != nil {
			return err
		}
		if err := b.once(ctx, d, plugin, d.volume(fs, volumeSize+int64(1+i)<<20)); err != nil {
			return err
		}
		for what, field := range map[string]string{"HWM": "VmHWM", "RSS": "VmRSS"} {
			mib, err := d.memory(field)
			if err != nil {
				return err
			}
			b.add(key{Case: "memory", Pool: d.kind.name, FS: fs, What: what, Way: plugin}, mib)
		}
	}
	return nil
}

// memory reads a field of the plugin's /proc/PID/status, in MiB: proc_pid_status(5).
func (d *bed) memory(field string) (float64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", d.PID()))
	if err != nil {
		return 0, err
	}
	m := regexp.MustCompile(`(?m)^` + field + `:\s+(\d+) kB$`).FindSubmatch(b)
	if m == nil {
		return 0, fmt.Errorf("no %s in\n%s", field, b)
	}
	kib, err := strconv.ParseFloat(string(m[1]), 64)
	return kib / 1024, err
}

// cost measures what a volume takes. The kernel's threads do part of the work for every way; they are not counted.
func cost(ctx context.Context, b *bench, d *bed) error {
	for _, fs := range filesystems {
		for _, name := range b.shuffled(d.names(peer, claim)) {
			k := key{Case: "cost", Pool: d.kind.name, FS: fs, Way: name}
			if err := b.costOf(ctx, d, k); err != nil {
				return fmt.Errorf("%s of %s: %w", name, fs, err)
			}
		}
	}
	return nil
}

func (b *bench) costOf(ctx context.Context, d *bed, k key) error {
	n := b.n(20, 5)
	w, vs := d.ways[k.Way], d.some(k.FS, n)
	if err := each(1, vs, w.prepare); err != nil {
		return err
	}
	pid := os.Getpid()
	if k.Way == plugin {
		pid = d.PID()
	}
	count, err := watchProcesses(pid)
	if err != nil {
		return err
	}
	free, err := d.free()
	if err != nil {
		return err
	}
	cpu, err := cpuTime(pid)
	if err != nil {
		return err
	}
	if err := each(1, vs, func(v *volume) error { return w.publish(ctx, v) }); err != nil {
		return err
	}
	now, err := d.free()
	if err != nil {
		return err
	}
	if err := b.takeAway(ctx, w, vs); err != nil {
		return err
	}
	time.Sleep(100 * time.Millisecond) // for what a way does after its answer
	used, err := cpuTime(pid)
	if err != nil {
		return err
	}
	for what, x := range map[string]float64{
		"CPU": milliseconds(used - cpu), "space": float64(free-now) / 1024, "processes": float64(count()),
	} {
		k.What = what
		b.add(k, x/float64(n))
	}
	return nil
}

// cpuTime is the processor time of a process and of its children that have ended and were waited for.
func cpuTime(pid int) (time.Duration, error) {
	// The kernel's number of the clock of another process: MAKE_PROCESS_CPUCLOCK in include/linux/posix-timers_types.h,
	// with CPUCLOCK_SCHED.
	var own unix.Timespec
	if err := unix.ClockGettime(int32(^pid<<3|2), &own); err != nil {
		return 0, os.NewSyscallError("clock_gettime", err)
	}
	children, err := childrenTime(pid)
	return time.Duration(own.Nano()) + children, err
}
