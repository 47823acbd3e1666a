#!/bin/bash
# Copyright The csi-disktemplate Authors.
# SPDX-License-Identifier: Apache-2.0

# Assembles the root filesystem of the plugin's image in DIR, from the packages
# that are installed here (deploy/image/packages). It takes the programs that the
# plugin starts, the libraries and files that they load, the formatting VM's kernel
# with the modules that it loads, and the licences. It takes no shell, no package
# manager, and nothing else.
#
#   deploy/image/rootfs.sh DIR PLUGIN
set -euo pipefail
export PATH="$PATH:/usr/sbin:/sbin" LC_ALL=C
root=$1 plugin=$2

fail() {
	echo "rootfs: $*; install the packages of deploy/image/packages" >&2
	exit 1
}

case $(dpkg --print-architecture) in
amd64) qemu=qemu-system-x86_64 firmware=(qboot.rom bios-microvm.bin pvh.bin linuxboot_dma.bin) ;;
arm64) qemu=qemu-system-aarch64 firmware=() ;;
*) fail "no image is known for $(dpkg --print-architecture)" ;;
esac
programs=("$qemu" qemu-img mkfs.btrfs btrfs mkfs.ext4 e2fsck resize2fs mkfs.xfs xfs_repair)
modules=(virtio_mmio virtio_blk btrfs ext4 xfs)

taken=() # files so far; their packages' licences are taken at the end

# take copies files into the root filesystem, under the path that they have here.
# Symbolic links are resolved, so on a merged /usr every file ends up below /usr.
take() {
	local path at
	for path; do
		[[ -e $path ]] || fail "$path is missing"
		at=$(realpath "$(dirname "$path")")/$(basename "$path")
		install -D -m "$(stat -Lc %a "$path")" "$path" "$root$at"
		taken+=("$(realpath "$path")")
	done
}

# libraries lists the libraries that the dynamic loader loads for a file, and the loader.
libraries() { ldd "$1" | grep -oE '/[^ ]+' || true; }

mkdir -p "$root"/{dev,etc,proc,sys,tmp,usr,var/lib}
chmod 1777 "$root/tmp"
for dir in bin lib lib64 sbin; do
	[[ ! -L /$dir ]] || cp -P "/$dir" "$root/$dir"
done

for program in "${programs[@]}"; do
	path=$(command -v "$program") || fail "$program is missing"
	take "$path"
	mapfile -t libs < <(libraries "$path")
	take "${libs[@]}"
done

# QEMU opens these by name, so that ldd does not list them: the part of the
# emulator that Debian builds as a module, and the firmware.
for accelerator in /usr/lib/*/qemu/accel-tcg-"${qemu#qemu-system-}".so; do
	[[ ! -e $accelerator ]] || take "$accelerator"
done
for file in "${firmware[@]}"; do
	take "/usr/share/qemu/$file"
done

# update-ca-certificates makes this file, so that no package has it. Go looks for it here.
take /etc/ssl/certs/ca-certificates.crt /usr/share/doc/ca-certificates/copyright

# The newest kernel that has its modules: the plugin chooses the same one.
for kernel in $(printf '%s\n' /boot/vmlinuz-* | sort -Vr); do
	version=${kernel#/boot/vmlinuz-}
	[[ ! -e /lib/modules/$version/modules.dep ]] || break
	version=
done
[[ ${version-} ]] || fail "no /boot/vmlinuz-VERSION has its modules in /lib/modules/VERSION"
take "$kernel" "/lib/modules/$version"/modules.{builtin,order}
for module in "${modules[@]}"; do
	mapfile -t files < <(modprobe --set-version "$version" --show-depends "$module" | sed -n 's/^insmod \(\S*\).*/\1/p')
	((${#files[@]} == 0)) || take "${files[@]}"
done
depmod --basedir "$root" "$version" 2>/dev/null
rm -f "$root/lib/modules/$version"/modules.*.bin

mapfile -t licences < <(dpkg -S "${taken[@]}" 2>/dev/null | sed 's/:.*//' | sort -u | sed 's|.*|/usr/share/doc/&/copyright|')
take "${licences[@]}"

install -D "$plugin" "$root/usr/bin/csi-disktemplate"
find "$root" -exec touch --no-dereference --date=@0 {} +
