#!/bin/bash
# Copyright The csi-disktemplate Authors.
# SPDX-License-Identifier: Apache-2.0

# Installs what csi-disktemplate needs besides Go. Where nothing is missing it
# does nothing, and does not ask the network.
#
#   hack/setup.sh          to build, run and test it
#   hack/setup.sh --demo   to build and run it
#   hack/setup.sh --e2e    to test it on a Kubernetes of its own
set -euo pipefail
export PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin" # su without - leaves them out

# The demo's witnesses (blkid, mount); certificates for Go's module proxy.
packages=(util-linux mount ca-certificates)
programs=(qemu-system-x86_64 mkfs.btrfs btrfs mkfs.xfs xfs_repair mkfs.ext4 e2fsck blkid mount)

case "${1-}" in
--demo) ;;
--e2e) # the node, and what its images are made of
	packages+=(busybox-static containerd containernetworking-plugins gcc git iproute2 iptables kmod libc6-dev make openssl procps runc wget)
	programs+=(busybox containerd ctr gcc git ip iptables modprobe openssl pgrep runc wget)
	;;
"") # tests: -race needs a C compiler
	packages+=(gcc libc6-dev git make)
	programs+=(gcc git make)
	;;
*)
	echo "usage: hack/setup.sh [--demo | --e2e]" >&2
	exit 2
	;;
esac

fail() {
	echo "setup: $*" >&2
	exit 1
}

# has_kernel tells whether there is a kernel the VM can boot: any in /boot that
# has its modules. One that is there is enough; a second one, installed beside
# it, might become what the machine itself boots next.
has_kernel() {
	local image
	for image in /boot/vmlinuz-*; do
		[[ -e /lib/modules/${image#/boot/vmlinuz-}/modules.dep ]] && return
	done
	return 1
}

[[ $(uname -s) == Linux && $(uname -m) == x86_64 ]] || fail "needs Linux on x86-64; this is $(uname -sm)"

if ! command -v apt-get >/dev/null || ! command -v dpkg-query >/dev/null; then
	missing=()
	for program in "${programs[@]}"; do
		command -v "$program" >/dev/null || missing+=("$program")
	done
	has_kernel || missing+=("a kernel in /boot/vmlinuz-VERSION with its modules in /lib/modules/VERSION")
	((${#missing[@]} == 0)) && exit
	fail "this is neither Debian nor Ubuntu; please install by hand:$(printf '\n  %s' "${missing[@]}")"
fi

# What the plugin needs, but for the kernel.
mapfile -t plugin < <("$(dirname "$0")/../deploy/image/packages.sh" | grep -v '^linux-image-')
packages+=("${plugin[@]}")
if ! has_kernel; then
	id=$(. /etc/os-release && echo "$ID")
	case $id in
	ubuntu) packages+=(linux-image-virtual) ;;
	*) packages+=(linux-image-cloud-amd64) ;;
	esac
fi

# A package that was never known makes dpkg-query fail: it is missing as well.
installed=$(dpkg-query -W -f='${db:Status-Status} ${Package}\n' "${packages[@]}" 2>/dev/null || true)
missing=()
for package in "${packages[@]}"; do
	grep -qx "installed $package" <<<"$installed" || missing+=("$package")
done
((${#missing[@]} == 0)) && exit

[[ $(id -u) == 0 ]] || fail "needs root to install ${missing[*]}: run \`sudo hack/setup.sh $*\`"

echo "setup: installing ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
# A machine that has just booted may be updating itself: wait for its lock.
apt=(apt-get -q -y -o DPkg::Lock::Timeout=300)
# Lists of somebody else's repository may fail while what is needed can be had.
"${apt[@]}" update </dev/null || echo "setup: apt-get update failed; going on with the lists there are" >&2
"${apt[@]}" install --no-install-recommends "${missing[@]}" </dev/null
has_kernel || fail "no /boot/vmlinuz-VERSION has its modules in /lib/modules/VERSION, even now"
