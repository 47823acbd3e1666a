#!/bin/bash
# Copyright The csi-disktemplate Authors.
# SPDX-License-Identifier: Apache-2.0

# Installs everything that csi-disktemplate needs besides Go. If nothing is missing, it does nothing
# and does not use the network.
#
#   hack/setup.sh          to build, run and test it
#   hack/setup.sh --demo   to build and run it
#   hack/setup.sh --bench  to measure it beside others
#   hack/setup.sh --e2e    to test it on a Kubernetes cluster that the tests start
set -euo pipefail
export PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin" # su without - leaves them out

# The demo checks with blkid and mount. Go's module proxy needs certificates.
packages=(util-linux mount ca-certificates)
programs=(qemu-system-x86_64 qemu-img mkfs.btrfs btrfs mkfs.xfs xfs_repair mkfs.ext4 e2fsck blkid mount)

# postgresql adds PostgreSQL to the packages. Any version will do. Debian has its programs outside PATH.
postgresql() { compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null || packages+=(postgresql); }

# browser adds a Chromium, under the name that the distribution has for it. TestPage takes any of these.
browser() {
	local program
	for program in chromium chromium-browser google-chrome; do
		command -v "$program" >/dev/null && return
	done
	case $(. /etc/os-release && echo "$ID") in
	ubuntu) packages+=(chromium-browser) ;;
	*) packages+=(chromium) ;;
	esac
	programs+=(chromium)
}

case "${1-}" in
--demo) ;;
--bench)
	packages+=(busybox-static fio git)
	programs+=(busybox fio git initdb)
	postgresql
	;;
--e2e) # for the node, and for building its images
	packages+=(busybox-static containerd containernetworking-plugins fdisk gcc git iproute2 iptables kmod libc6-dev make mtools openssl procps
		runc seabios syslinux syslinux-common wget zstd)
	programs+=(busybox containerd ctr gcc git initdb ip iptables mformat modprobe openssl pgrep runc sfdisk syslinux wget zstd)
	postgresql
	;;
"") # tests: -race needs a C compiler
	packages+=(checkpolicy fdisk fonts-dejavu-core gcc libc6-dev git make prometheus)
	programs+=(checkpolicy sfdisk gcc git make prometheus promtool)
	browser
	;;
*)
	echo "usage: hack/setup.sh [--demo | --bench | --e2e]" >&2
	exit 2
	;;
esac

fail() {
	echo "setup: $*" >&2
	exit 1
}

# has_kernel reports whether there is a kernel that the VM can boot: any in /boot that has its
# modules. One is enough. A second one, installed beside it, might be the one that the machine itself
# boots next.
has_kernel() {
	local image
	for image in /boot/vmlinuz-*; do
		[[ -e /lib/modules/${image#/boot/vmlinuz-}/modules.dep ]] && return
	done
	return 1
}

[[ $(uname -s) == Linux && $(uname -m) == x86_64 ]] || fail "this machine is $(uname -sm), and csi-disktemplate needs Linux on x86-64"

if ! command -v apt-get >/dev/null || ! command -v dpkg-query >/dev/null; then
	missing=()
	for program in "${programs[@]}"; do
		command -v "$program" >/dev/null || missing+=("$program")
	done
	has_kernel || missing+=("a kernel in /boot/vmlinuz-VERSION with its modules in /lib/modules/VERSION")
	((${#missing[@]} == 0)) && exit
	fail "this machine is neither Debian nor Ubuntu; please install by hand:$(printf '\n  %s' "${missing[@]}")"
fi

# The plugin's own packages, without the kernel.
mapfile -t plugin < <("$(dirname "$0")/../deploy/image/packages.sh" | grep -v '^linux-image-')
packages+=("${plugin[@]}")
if ! has_kernel; then
	id=$(. /etc/os-release && echo "$ID")
	case $id in
	ubuntu) packages+=(linux-image-virtual) ;;
	*) packages+=(linux-image-cloud-amd64) ;;
	esac
fi

# dpkg-query fails if it has never seen one of the packages. That one is missing too.
installed=$(dpkg-query -W -f='${db:Status-Status} ${Package}\n' "${packages[@]}" 2>/dev/null || true)
missing=()
for package in "${packages[@]}"; do
	grep -qx "installed $package" <<<"$installed" || missing+=("$package")
done
((${#missing[@]} == 0)) && exit

[[ $(id -u) == 0 ]] || fail "installing ${missing[*]} needs root; run \`sudo hack/setup.sh $*\`"

echo "setup: installing ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
# Benchmark and tests make their own database clusters, so Debian is to make and start none. If the file is there
# already, its owner decides.
cluster=/etc/postgresql-common/createcluster.conf
if [[ " ${missing[*]} " == *" postgresql "* && ! -e $cluster ]]; then
	mkdir -p "${cluster%/*}"
	echo "create_main_cluster = false # written by csi-disktemplate's hack/setup.sh" >"$cluster"
fi
# A machine that has just booted may be updating itself, so wait for its lock.
apt=(apt-get -q -y -o DPkg::Lock::Timeout=300)
# The update of another repository's lists may fail while the packages are available.
"${apt[@]}" update </dev/null || echo "setup: apt-get update failed; going on with the existing lists" >&2
"${apt[@]}" install --no-install-recommends "${missing[@]}" </dev/null
# The tests start a Prometheus of their own, so Debian's is not to run.
if [[ " ${missing[*]} " == *" prometheus "* && -d /run/systemd/system ]]; then
	systemctl disable --now prometheus.service
fi
has_kernel || fail "still no /boot/vmlinuz-VERSION has its modules in /lib/modules/VERSION"
