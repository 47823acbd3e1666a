// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
)

// IsInit reports whether this process is /init of a formatting VM. Being PID 1
// is not enough: in a container the plugin is PID 1 too.
func IsInit() bool {
	return os.Getpid() == 1 && os.Args[0] == InitPath
}

// diskWait bounds the wait for the two disks after their driver was loaded. Probing is
// synchronous: the wait is for a kernel that defers it.
const diskWait = 3 * time.Second

// Main is PID 1 of the VM. It carries out the job, writes the verdict, and powers the VM off.
// It does not return.
func Main() {
	for _, m := range []struct{ source, target, fstype string }{
		{"proc", "/proc", "proc"},
		{"sysfs", "/sys", "sysfs"},
		{"devtmpfs", "/dev", "devtmpfs"},
	} {
		if err := unix.Mount(m.source, m.target, m.fstype, 0, ""); err != nil {
			fmt.Printf("csi-disktemplate: mounting %s: %v\n", m.target, err)
		}
	}
	v := Verdict{Stage: StageBoot}
	for _, arg := range os.Args[1:] {
		if n, ok := strings.CutPrefix(arg, NonceArg); ok {
			v.Nonce = n
		}
	}
	if err := work(&v); err != nil {
		v.OK = false
		v.Error = err.Error()
		fmt.Printf("csi-disktemplate: %s: %v\n%s\n", v.Stage, err, v.Output)
	}
	if err := deliver(v); err != nil {
		// Without a verdict the host reports a failure, and shows the console's last lines.
		fmt.Printf("csi-disktemplate: writing the verdict: %v\n", err)
	}
	unix.Sync()
	err := unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	fmt.Printf("csi-disktemplate: power off: %v\n", err)
	os.Exit(1) // the kernel panics, and the host sees that
}

// work does the whole job, and records in v how far it got.
func work(v *Verdict) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("init panicked: %v", p)
		}
	}()
	if b, err := os.ReadFile(MarkerPath); err != nil || string(b) != Marker {
		return errors.New("the initramfs is truncated: its last entry is missing; give the VM more memory, or look for a full disk on the node")
	}
	var job Job
	if b, err := os.ReadFile(JobPath); err != nil {
		return err
	} else if err := json.Unmarshal(b, &job); err != nil {
		return fmt.Errorf("%s: %w", JobPath, err)
	}
	fs, err := diskfs.Lookup(job.Filesystem)
	if err != nil {
		return err
	}
	if err := loadModules(job.Modules); err != nil {
		return err
	}
	disk, err := findDisk(TemplateSerial)
	if err != nil {
		return err
	}
	v.Kernel = release()
	if out, _ := run(job.Version); out != "" {
		v.Mkfs = strings.TrimSpace(strings.SplitN(strings.TrimSpace(out), "\n", 2)[0])
	}

	v.enter(StageMkfs)
	v.BootMS = uptime().Milliseconds()
	if err := v.command(job.Mkfs, disk); err != nil {
		return err
	}
	dev, err := flush(disk)
	if err != nil {
		return err
	}
	defer dev.Close()
	v.MkfsMS = uptime().Milliseconds() - v.BootMS

	// From here on nothing may change a byte of the template. The kernel is told to refuse
	// writes, and the count of sectors written proves that there were none.
	v.enter(StageCheck)
	before, err := sectorsWritten(disk)
	if err != nil {
		return err
	}
	if err := setReadOnly(dev); err != nil {
		return err
	}
	sb, err := fs.Verify(dev, job.Size, job.Label)
	if err != nil {
		v.ExitCode = ExitUnwritten
		return fmt.Errorf("%s exited with 0 but left no valid filesystem: %w", job.Mkfs[0], err)
	}
	v.UUID = sb.UUID.String()
	if err := mountOnce(disk, job); err != nil {
		return err
	}
	if err := v.command(job.Check, disk); err != nil {
		return err
	}
	after, err := sectorsWritten(disk)
	if err != nil {
		return err
	}
	v.Written = after - before
	if v.Written != 0 {
		return fmt.Errorf("the read-only check wrote %d sectors to the template", v.Written)
	}
	v.CheckMS = uptime().Milliseconds() - v.BootMS - v.MkfsMS
	v.enter(StageDone)
	v.OK = true
	return nil
}

func (v *Verdict) enter(s Stage) {
	v.Stage = s
	fmt.Println(StagePrefix + string(s))
}

// command runs one of the job's commands. If it fails, v gets its exit code and its output.
func (v *Verdict) command(argv []string, disk string) error {
	argv = commandLine(argv, disk)
	out, err := run(argv)
	if err == nil {
		return nil
	}
	v.Output = out
	v.ExitCode = 127 // a shell's code for a command that could not be run
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		v.ExitCode = exit.ExitCode()
	}
	return fmt.Errorf("%s: %w", strings.Join(argv, " "), err)
}

// commandLine replaces the job's placeholder by the disk's name.
func commandLine(argv []string, disk string) []string {
	args := make([]string, len(argv))
	for i, a := range argv {
		args[i] = strings.ReplaceAll(a, DevicePlaceholder, disk)
	}
	return args
}

func run(argv []string) (string, error) {
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Env = []string{"PATH=/bin", "LD_LIBRARY_PATH=" + LibDir, "LC_ALL=C"}
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// loadModules loads modules in the given order, dependencies first. A module that is loaded
// already is no error.
func loadModules(paths []string) error {
	for _, p := range paths {
		f, err := os.Open(p)
		if err != nil {
			return err
		}
		err = unix.FinitModule(int(f.Fd()), "", 0)
		f.Close()
		if err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("loading %s: %w", p, err)
		}
	}
	return nil
}

// findDisk returns the path of the disk with this virtio serial.
func findDisk(serial string) (string, error) {
	for deadline := time.Now().Add(diskWait); ; time.Sleep(5 * time.Millisecond) {
		names, _ := filepath.Glob("/sys/block/vd*/serial")
		for _, name := range names {
			b, err := os.ReadFile(name)
			if err == nil && strings.TrimSpace(string(b)) == serial {
				return "/dev/" + filepath.Base(filepath.Dir(name)), nil
			}
		}
		if time.Now().After(deadline) {
			return "", fmt.Errorf("no disk with serial %q appeared within %s", serial, diskWait)
		}
	}
}

// flush makes mkfs's writes durable in the image and drops the block device's page cache, so
// that later reads come from the image. It returns the open device.
func flush(disk string) (*os.File, error) {
	dev, err := os.OpenFile(disk, os.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	if err := dev.Sync(); err != nil {
		dev.Close()
		return nil, fmt.Errorf("fsync %s: %w", disk, err)
	}
	if _, err := unix.IoctlRetInt(int(dev.Fd()), unix.BLKFLSBUF); err != nil {
		dev.Close()
		return nil, fmt.Errorf("BLKFLSBUF %s: %w", disk, err)
	}
	return dev, nil
}

// setReadOnly makes the kernel refuse every further write to the device.
func setReadOnly(dev *os.File) error {
	on := int32(1)
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, dev.Fd(), unix.BLKROSET, uintptr(unsafe.Pointer(&on)))
	if errno != 0 {
		return fmt.Errorf("BLKROSET %s: %w", dev.Name(), errno)
	}
	return nil
}

// sectorsWritten returns field 7 of /sys/block/<dev>/stat, in units of 512 bytes.
func sectorsWritten(disk string) (int64, error) {
	name := filepath.Join("/sys/block", filepath.Base(disk), "stat")
	b, err := os.ReadFile(name)
	if err != nil {
		return 0, err
	}
	fields := strings.Fields(string(b))
	if len(fields) < 7 {
		return 0, fmt.Errorf("%s: %q has no field 7", name, b)
	}
	return strconv.ParseInt(fields[6], 10, 64)
}

// mountOnce has the guest's kernel mount the filesystem read-only and unmount it.
func mountOnce(disk string, job Job) error {
	const dir = "/mnt"
	if err := unix.Mount(disk, dir, job.Filesystem, unix.MS_RDONLY, job.MountData); err != nil {
		return fmt.Errorf("the guest's kernel cannot mount the new %s with the options %q: %w", job.Filesystem, job.MountData, err)
	}
	if _, err := os.ReadDir(dir); err != nil {
		return fmt.Errorf("reading the root directory of the new %s: %w", job.Filesystem, err)
	}
	if err := unix.Unmount(dir, 0); err != nil {
		return fmt.Errorf("unmounting the new %s: %w", job.Filesystem, err)
	}
	return nil
}

// deliver writes the verdict to its disk and makes it durable there.
func deliver(v Verdict) error {
	b, err := v.Marshal()
	if err != nil {
		return err
	}
	disk, err := findDisk(VerdictSerial)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(disk, os.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.WriteAt(b, 0); err != nil {
		return err
	}
	return f.Sync()
}

func release() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return ""
	}
	return unix.ByteSliceToString(u.Release[:])
}

// uptime returns the time since the kernel started, so that it also measures the boot.
func uptime() time.Duration {
	var ts unix.Timespec
	if unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts) != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}
