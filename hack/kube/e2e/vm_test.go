// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build e2e

package e2e

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// vm is a pod with QEMU, as contents-disk.yaml has them, whose guest is that of hack/kube/images.sh.
type vm struct {
	t        testing.TB
	pod, uid string
	guest    net.Conn
	answers  *bufio.Reader
	monitor  net.Conn
	messages *json.Decoder
}

// patienceOfGuests is for a guest that shares two processors with twenty others, without KVM.
const patienceOfGuests = 5 * time.Minute

// openVM waits until a VM's guest answers.
func openVM(t testing.TB, pod string) *vm {
	t.Helper()
	v := &vm{t: t, pod: pod, uid: get(t, "pod "+pod, ".metadata.uid")}
	v.connect()
	t.Cleanup(v.close)
	for deadline, n := time.Now().Add(patienceOfGuests), 0; ; n++ {
		fmt.Fprintf(v.guest, "\necho hello %d\n", n) // lost, as long as the guest boots
		v.guest.SetReadDeadline(time.Now().Add(2 * time.Second))
		for {
			answer, err := v.answers.ReadString('\n')
			if answer == fmt.Sprintf("0 hello %d\n", n) {
				return v
			}
			if errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
			if err != nil { // QEMU has ended, and its pod starts again
				v.close()
				time.Sleep(time.Second)
				v.connect()
				break
			}
		}
		if time.Now().After(deadline) {
			t.Fatalf("the guest of %s does not answer:\n%s", pod, kubectl(t, "logs", pod))
		}
	}
}

// connect connects to the guest's second serial port.
func (v *vm) connect() {
	v.t.Helper()
	v.guest = v.dial("serial")
	v.answers = bufio.NewReader(v.guest)
}

// close lets another vm connect to the same sockets, which take one connection at a time.
func (v *vm) close() {
	v.guest.Close()
	if v.monitor != nil {
		v.monitor.Close()
	}
}

// dir is the emptyDir of a VM's pod, in the node's mount namespace.
func (v *vm) dir() string {
	return "/var/lib/kubelet/pods/" + v.uid + "/volumes/kubernetes.io~empty-dir/vm"
}

// dial connects to a socket of the VM. The directory is opened first, since a socket's path has at most 108 bytes.
func (v *vm) dial(name string) net.Conn {
	v.t.Helper()
	init, err := os.ReadFile(filepath.Join(stateDir(), "init.pid"))
	if err != nil {
		v.t.Fatal(err)
	}
	path := filepath.Join("/proc", strings.TrimSpace(string(init)), "root", v.dir())
	for deadline := time.Now().Add(patience); ; time.Sleep(100 * time.Millisecond) { // the pod may just start
		dir, err := os.Open(path)
		if err == nil {
			var c net.Conn
			c, err = net.Dial("unix", fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), name))
			dir.Close()
			if err == nil {
				return c
			}
		}
		if time.Now().After(deadline) {
			v.t.Fatalf("%s: %v\n%s", v.pod, err, kubectl(v.t, "describe", "pod", v.pod))
		}
	}
}

// run runs a shell command in the guest, which must succeed, and returns what it printed as one line.
func (v *vm) run(command string) string {
	v.t.Helper()
	fmt.Fprintln(v.guest, command)
	v.guest.SetReadDeadline(time.Now().Add(patienceOfGuests))
	answer, err := v.answers.ReadString('\n')
	code, printed, _ := strings.Cut(strings.TrimSuffix(answer, "\n"), " ")
	if err != nil || code != "0" {
		v.t.Fatalf("%s, %s: %q, %v", v.pod, command, answer, err)
	}
	return printed
}

// says has the guest run a command that must print one line.
func (v *vm) says(want, command string) {
	v.t.Helper()
	if got := v.run(command); got != want {
		v.t.Errorf("%s, %s: %q, expected %q", v.pod, command, got, want)
	}
}

// message is what QEMU says by QMP.
type message struct {
	Event  string
	Data   struct{ Device string }
	Return json.RawMessage
	Error  json.RawMessage
}

// qmp has QEMU execute a command, as libvirt does.
func (v *vm) qmp(command string, arguments map[string]any) {
	v.t.Helper()
	if v.monitor == nil {
		v.monitor = v.dial("qmp")
		v.messages = json.NewDecoder(v.monitor)
		v.until("the greeting", func(m message) bool { return m.Event == "" })
		v.qmp("qmp_capabilities", nil)
	}
	request := map[string]any{"execute": command}
	if arguments != nil {
		request["arguments"] = arguments
	}
	if err := json.NewEncoder(v.monitor).Encode(request); err != nil {
		v.t.Fatal(err)
	}
	v.until(command, func(m message) bool {
		if m.Error != nil {
			v.t.Fatalf("%s: %v: %s", v.pod, request, m.Error)
		}
		return m.Return != nil
	})
}

// until reads what QEMU says.
func (v *vm) until(what string, is func(message) bool) {
	v.t.Helper()
	v.monitor.SetReadDeadline(time.Now().Add(patience))
	for {
		var m message
		if err := v.messages.Decode(&m); err != nil {
			v.t.Fatalf("%s: %s: %v", v.pod, what, err)
		}
		if is(m) {
			return
		}
	}
}

// plug gives the VM a file or a device in its directory as another disk, and returns the guest's name of it.
func (v *vm) plug(name, driver string, sectors map[string]any) (disk string) {
	v.t.Helper()
	v.qmp("blockdev-add", map[string]any{
		"node-name": name, "driver": driver, "filename": "/vm/" + name,
		"cache": map[string]any{"direct": true}, "discard": "unmap",
	})
	device := map[string]any{"driver": "virtio-blk-pci", "id": "disk-" + name, "drive": name, "serial": name}
	for k, n := range sectors {
		device[k] = n
	}
	v.qmp("device_add", device)
	return v.run("until f=$(grep -lx " + name + " /sys/block/*/serial); do sleep 0.1; done; f=${f%/serial}; " +
		"until [ -b /dev/${f##*/} ]; do sleep 0.1; done; echo ${f##*/}")
}

// unplug takes the disk away again.
func (v *vm) unplug(name string) {
	v.t.Helper()
	v.qmp("device_del", map[string]any{"id": "disk-" + name})
	v.until("the end of "+name, func(m message) bool {
		return m.Event == "DEVICE_DELETED" && m.Data.Device == "disk-"+name
	})
	v.qmp("blockdev-del", map[string]any{"node-name": name})
}

// giveDevice makes a node of another pod's block volume in the VM's directory, and lets the VM's containers open it, as
// KubeVirt's virt-handler does. The test cluster has version 1 of cgroups.
func (v *vm) giveDevice(pod, claim string) {
	v.t.Helper()
	on(v.t, "sh", "-euc", `
		set -- $(stat -Lc '%Hr %Lr' "$1") "$2" "$3"
		mknod "$3" b $1 $2
		chown 107:107 "$3"
		for allow in $(find /sys/fs/cgroup/devices -path "*pod$4/*" -name devices.allow); do
			echo "b $1:$2 rwm" >"$allow"
		done`,
		"sh", fmt.Sprintf("/var/lib/kubelet/pods/%s/volumeDevices/kubernetes.io~csi/%s",
			get(v.t, "pod "+pod, ".metadata.uid"), get(v.t, "pvc "+claim, ".spec.volumeName")), v.dir()+"/"+claim, v.uid)
}

// giveImage binds the disk.img of another pod's volume into the VM's directory, as virt-handler does.
func (v *vm) giveImage(pod, claim string) {
	v.t.Helper()
	on(v.t, "sh", "-euc", `chown 107:107 "$1"; : >"$2"; mount --bind "$1" "$2"`,
		"sh", fmt.Sprintf("/var/lib/kubelet/pods/%s/volumes/kubernetes.io~csi/%s/mount/disk.img",
			get(v.t, "pod "+pod, ".metadata.uid"), get(v.t, "pvc "+claim, ".spec.volumeName")), v.dir()+"/"+claim)
	v.t.Cleanup(func() { cluster("", "run", "umount", "--lazy", v.dir()+"/"+claim) }) // a failed test's
}

// take undoes giveDevice or giveImage.
func (v *vm) take(claim string) {
	v.t.Helper()
	on(v.t, "sh", "-euc", `[ -b "$1" ] || umount "$1"; rm "$1"`, "sh", v.dir()+"/"+claim)
}
