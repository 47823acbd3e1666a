// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package vmformat

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
)

// TestContextByKernel runs TestContext of pkg/volume in a VM: the kernel of the image has SELinux,
// whatever this machine's kernel has. Its policy knows the labels of containers and allows
// everything.
func TestContextByKernel(t *testing.T) {
	testenv.Root(t)
	said := runVolumeTest(t, volumeTest{
		name: "TestContext", filesystems: []string{"xfs", "ext4", "btrfs"},
		files:   map[string]string{"/policy": policy(t)},
		cmdline: []string{"security=selinux", "selinux=1", "enforcing=0"},
	})
	if !strings.Contains(said, "--- PASS: TestContext/xfs") {
		t.Error("the test failed in the VM")
	}
}

// policy compiles a policy, and returns the file that the kernel loads.
func policy(t *testing.T) string {
	t.Helper()
	dir := testenv.Dir(t)
	source, binary := filepath.Join(dir, "policy.conf"), filepath.Join(dir, "policy")
	if err := os.WriteFile(source, []byte(policySource()), 0o600); err != nil {
		t.Fatal(err)
	}
	// -M: with levels. -U allow: of classes that the policy does not name, everything is allowed.
	testenv.Run(t, "checkpolicy", "-M", "-U", "allow", "-c", "31", "-o", binary, source)
	return binary
}

// initialSIDs are those of security/selinux/include/initial_sid_to_string.h, in its order.
const initialSIDs = "kernel security unlabeled fs file file_labels init any_socket port netif netmsg node igmp_packet " +
	"icmp_socket tcp_socket sysctl_modprobe sysctl sysctl_fs sysctl_kernel sysctl_net sysctl_net_unix sysctl_vm sysctl_dev kmod " +
	"policy scmp_packet devnull"

// policySource is the least policy that the kernel loads, in the order that checkpolicy wants. The
// form is that of scripts/selinux/mdp in the kernel's source.
func policySource() string {
	var s strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&s, format+"\n", args...) }
	line("class process\nclass file")
	for _, sid := range strings.Fields(initialSIDs) {
		line("sid %s", sid)
	}
	// The kernel looks these up: without the class of a file it labels none.
	line("class process { transition dyntransition }\nclass file { relabelto }")
	line("sensitivity s0;\ndominance { s0 }")
	for i := range 8 {
		line("category c%d;", i)
	}
	line("level s0:c0.c7;")
	line("mlsconstrain process transition (l1 eq l2);") // there has to be one
	line("type kernel_t;\ntype file_t;\ntype container_file_t;")
	line("role system_r;\nrole system_r types kernel_t;")
	line("allow kernel_t kernel_t:process transition;")
	line("user system_u roles system_r level s0 range s0 - s0:c0.c7;")
	for _, sid := range strings.Fields(initialSIDs) {
		label := "object_r:file_t"
		if sid == "kernel" || sid == "init" || sid == "kmod" {
			label = "system_r:kernel_t"
		}
		line("sid %s system_u:%s:s0", sid, label)
	}
	for _, fs := range []string{"ext4", "xfs", "btrfs"} {
		line("fs_use_xattr %s system_u:object_r:file_t:s0;", fs)
	}
	line("fs_use_trans tmpfs system_u:object_r:file_t:s0;")
	line("genfscon proc / system_u:object_r:file_t:s0")
	return s.String()
}
