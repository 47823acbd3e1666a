// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
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

// Main is PID 1 of the VM. It carries out the batch, writes the verdicts, and powers the VM off.
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
	if err := serve(); err != nil {
		// Without verdicts the host reports a failure, and shows the console's last lines.
		fmt.Printf("csi-disktemplate: %v\n", err)
	}
	unix.Sync()
	err := unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	fmt.Printf("csi-disktemplate: power off: %v\n", err)
	os.Exit(1) // the kernel panics, and the host sees that
}

// serve does all that needs no disk, waits until the host says to go on, and carries out the
// batch. The host may save the VM while it waits, and go on with any number of copies of it.
func serve() error {
	if b, err := os.ReadFile(MarkerPath); err != nil || string(b) != Marker {
		return errors.New("boot: the initramfs is truncated: its last entry is missing; give the VM more memory, or look for a full disk on the node")
	}
	var setup Setup
	if b, err := os.ReadFile(SetupPath); err != nil {
		return err
	} else if err := json.Unmarshal(b, &setup); err != nil {
		return fmt.Errorf("%s: %w", SetupPath, err)
	}
	if err := loadModules(setup.Modules); err != nil {
		return err
	}
	// Disks that appear wait until they are asked for: see disks.
	if err := os.WriteFile(virtioBus+"/drivers_autoprobe", []byte("0"), 0); err != nil {
		return err
	}
	common := Verdict{Stage: StageBoot, Kernel: release()}
	if out, _ := run(setup.Version); out != "" {
		common.Mkfs = strings.TrimSpace(strings.SplitN(strings.TrimSpace(out), "\n", 2)[0])
	}

	fmt.Println(StagePrefix + string(StageReady))
	if _, err := os.Stdin.Read(make([]byte, 1)); err != nil {
		return fmt.Errorf("waiting on the console: %w", err)
	}

	if err := loadModules(setup.Transports); err != nil {
		return err
	}
	var disks disks
	path, err := disks.find(ControlSerial)
	if err != nil {
		return err
	}
	control, err := os.OpenFile(path, os.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer control.Close()
	batch, err := receive(control)
	if err != nil {
		return err
	}
	for i, order := range batch.Orders {
		v := common
		v.Nonce = order.Nonce
		if err := work(&v, i, order, &disks); err != nil {
			v.OK = false
			v.Error = err.Error()
			fmt.Printf("csi-disktemplate: %s: %v\n%s\n", v.Stage, err, v.Output)
		}
		if err := deliver(v, i, control); err != nil {
			fmt.Printf("csi-disktemplate: writing the verdict: %v\n", err)
		}
	}
	return control.Sync()
}

// receive reads the batch, and makes the guest's clock and random numbers those of this run.
func receive(control *os.File) (Batch, error) {
	b := make([]byte, BatchSize)
	if _, err := control.ReadAt(b, 0); err != nil {
		return Batch{}, err
	}
	batch, err := ParseBatch(b)
	if err != nil {
		return Batch{}, err
	}
	now := unix.NsecToTimespec(batch.Time)
	if err := unix.ClockSettime(unix.CLOCK_REALTIME, &now); err != nil {
		return Batch{}, fmt.Errorf("setting the clock: %w", err)
	}
	return batch, reseed(batch.Seed)
}

// reseed gives entropy to the kernel's random number generator, and makes it use that from now on:
// RNDADDENTROPY and RNDRESEEDCRNG in random(4).
func reseed(seed []byte) error {
	random, err := os.OpenFile("/dev/random", os.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer random.Close()
	var info struct { // struct rand_pool_info
		bits, size int32
		buf        [32]byte
	}
	info.size = int32(copy(info.buf[:], seed))
	info.bits = 8 * info.size
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, random.Fd(), unix.RNDADDENTROPY, uintptr(unsafe.Pointer(&info))); errno != 0 {
		return fmt.Errorf("RNDADDENTROPY: %w", errno)
	}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, random.Fd(), rndReseedCRNG, 0); errno != 0 {
		return fmt.Errorf("RNDRESEEDCRNG: %w", errno)
	}
	return nil
}

const rndReseedCRNG = 0x5207 // _IO('R', 0x07), include/uapi/linux/random.h

// work does one job, and records in v how far it got.
func work(v *Verdict, index int, order Order, disks *disks) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("init panicked: %v", p)
		}
	}()
	job := order.Job
	disk, err := disks.find(Disk(index))
	if err != nil {
		return err
	}
	fs, err := diskfs.Lookup(job.Filesystem)
	if err != nil {
		return err
	}
	start := time.Now()
	v.enter(StageMkfs, index)
	if err := v.command(job.Mkfs, disk); err != nil {
		return err
	}
	dev, err := flush(disk)
	if err != nil {
		return err
	}
	defer dev.Close()
	v.MkfsMS = time.Since(start).Milliseconds()
	if job.Content != nil {
		if err := v.unpack(disk, index, order, disks); err != nil {
			return err
		}
		if err := settle(dev); err != nil {
			return err
		}
	}

	// From here on nothing may change a byte of the template. The kernel is told to refuse
	// writes, and the count of sectors written proves that there were none.
	v.enter(StageCheck, index)
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
	v.CheckMS = time.Since(start).Milliseconds() - v.MkfsMS - v.UnpackMS
	v.enter(StageDone, index)
	v.OK = true
	return nil
}

func (v *Verdict) enter(s Stage, index int) {
	v.Stage = s
	fmt.Println(Progress{Stage: s}.line(index))
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

const virtioBus = "/sys/bus/virtio"

// disks finds disks by their virtio serial. A disk takes some 20 ms until its driver has it (TCG), and
// most disks have no job. So they are bound to their driver one by one, until the wanted one is
// there.
type disks struct {
	known map[string]string // serial → path
	tried map[string]bool   // virtio devices
}

// find returns the path of the disk with this serial.
func (d *disks) find(serial string) (string, error) {
	if d.known == nil {
		d.known, d.tried = map[string]string{}, map[string]bool{}
	}
	devices, err := filepath.Glob(virtioBus + "/devices/*")
	if err != nil {
		return "", err
	}
	slices.SortFunc(devices, func(a, b string) int { return cmp.Or(len(a)-len(b), strings.Compare(a, b)) }) // by number
	for _, device := range devices {
		if d.known[serial] != "" {
			break
		}
		if d.tried[device] {
			continue
		}
		d.tried[device] = true
		// Probing is synchronous. It fails for a device that is no disk, or has its driver.
		os.WriteFile(virtioBus+"/drivers/virtio_blk/bind", []byte(filepath.Base(device)), 0)
		names, _ := filepath.Glob(device + "/block/vd*/serial")
		for _, name := range names {
			if b, err := os.ReadFile(name); err == nil {
				d.known[strings.TrimSpace(string(b))] = "/dev/" + filepath.Base(filepath.Dir(name))
			}
		}
	}
	if d.known[serial] == "" {
		return "", fmt.Errorf("of %d virtio devices, none is a disk with the serial %q", len(devices), serial)
	}
	return d.known[serial], nil
}

// flush makes mkfs's writes durable in the image and drops the block device's page cache, so
// that later reads come from the image. It returns the open device.
func flush(disk string) (*os.File, error) {
	dev, err := os.OpenFile(disk, os.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	if err := settle(dev); err != nil {
		dev.Close()
		return nil, err
	}
	return dev, nil
}

// settle is flush for a device that is open.
func settle(dev *os.File) error {
	if err := dev.Sync(); err != nil {
		return fmt.Errorf("fsync %s: %w", dev.Name(), err)
	}
	if _, err := unix.IoctlRetInt(int(dev.Fd()), unix.BLKFLSBUF); err != nil {
		return fmt.Errorf("BLKFLSBUF %s: %w", dev.Name(), err)
	}
	return nil
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

// mountPoint is a directory of the initramfs.
const mountPoint = "/mnt"

// mountOnce has the guest's kernel mount the filesystem read-only and unmount it.
func mountOnce(disk string, job Job) error {
	const dir = mountPoint
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

// deliver writes a job's verdict to its place on the control disk, and makes it durable there.
func deliver(v Verdict, index int, control *os.File) error {
	b, err := v.Marshal()
	if err != nil {
		return err
	}
	if _, err := control.WriteAt(b, VerdictAt(index)); err != nil {
		return err
	}
	return control.Sync()
}

func release() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return ""
	}
	return unix.ByteSliceToString(u.Release[:])
}
