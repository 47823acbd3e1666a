#!/bin/bash
# Copyright The csi-disktemplate Authors.
# SPDX-License-Identifier: Apache-2.0

# Makes every image that the cluster runs, as docker-archive files in OUT, because
# there is no registry. BIN is the directory that build.sh printed. The plugin's own
# image comes from deploy/image.
#
#   hack/kube/images.sh OUT BIN
set -euo pipefail
export PATH="$PATH:/usr/local/go/bin:/usr/sbin:/sbin"
here=$(dirname "$(realpath "$0")")
out=$(realpath "$1") bin=$(realpath "$2")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

image() { "$here/../image.sh" "$out/$1.tar" "${@:2}"; }

# The sidecars, under their names in the manifests.
for name in csi-provisioner csi-resizer csi-snapshotter; do
	mkdir -p "$scratch/$name"
	ln "$bin/$name" "$scratch/$name/$name" 2>/dev/null || cp "$bin/$name" "$scratch/$name/$name"
	reference=$(sed -n "s|.*image: \(registry.k8s.io/sig-storage/$name:.*\)|\1|p" "$here"/../../deploy/kubernetes/components/{claims,snapshots}/*.yaml | sort -u)
	image "$name" "$reference" "$scratch/$name" "[\"/$name\"]"
done

# pause waits, and reaps the processes that containers orphan.
mkdir "$scratch/pause"
cat >"$scratch/pause.c" <<'C'
#include <signal.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>
static void down(int s) { exit(0); }
static void reap(int s) { while (waitpid(-1, NULL, WNOHANG) > 0); }
int main(void) { signal(SIGINT, down); signal(SIGTERM, down); signal(SIGCHLD, reap); for (;;) pause(); }
C
gcc -Os -static -s -o "$scratch/pause/pause" "$scratch/pause.c"
image pause registry.k8s.io/pause:3.10 "$scratch/pause" '["/pause"]'

# busybox, also under the names of other images of which the suite uses only the
# shell. The suite needs dd with oflag=nocache, which only coreutils' dd has, and a
# shell with `let`, which bash has and dash lacks. Debian's busybox runs its own applets
# before programs on PATH, so it gets no links with these two names.
root=$scratch/busybox
mkdir -p "$root"/{bin,dev,etc,proc,root,sbin,sys,tmp,usr/bin}
chmod 1777 "$root/tmp"
cp /bin/busybox "$root/bin/busybox"
for applet in $(/bin/busybox --list); do
	case $applet in
	busybox | dd | sh) ;;
	*) ln -s busybox "$root/bin/$applet" ;;
	esac
done
ln -s ../../bin/busybox "$root/usr/bin/env"
cp -L /bin/dd "$root/bin/dd"
cp -L /bin/bash "$root/bin/sh"
for library in $({ ldd /bin/dd; ldd /bin/bash; } | grep -oE '/[^ ]+' | sort -u); do
	install -D -m 0755 "$library" "$root$library"
done
echo 'root:x:0:0:root:/root:/bin/sh' >"$root/etc/passwd"
echo 'root:x:0:' >"$root/etc/group"
suite=registry.k8s.io/e2e-test-images
image busybox "$suite/busybox:1.37.0-2" "$root" null '["sh"]'
image busybox-docker docker.io/library/busybox:1.37 "$root" null '["sh"]' # the examples use this name
image nginx "$suite/nginx:1.27.0-2" "$root" null '["sh"]'
image glibc-dns-testing "$suite/glibc-dns-testing:2.1.1" "$root" null '["sh"]'
cp "$bin/agnhost" "$root/agnhost"
image agnhost "$suite/agnhost:2.66.1" "$root" '["/agnhost"]' '["pause"]'

# A VM: QEMU, a kernel, and an initramfs that mounts the VM's disk.
vm=$scratch/vm
"$here/../../deploy/image/rootfs.sh" "$vm" /bin/true
initramfs=$scratch/initramfs
mkdir -p "$initramfs"/{bin,dev,mnt,modules,proc,sys}
cp /bin/busybox "$initramfs/bin/busybox"
ln -s busybox "$initramfs/bin/sh"
version=$(basename "$vm"/boot/vmlinuz-*)
version=${version#vmlinuz-}
for module in virtio_mmio virtio_blk ext4; do
	modprobe --set-version "$version" --show-depends "$module" | sed -n 's/^insmod \(\S*\).*/\1/p'
done | awk '!seen[$0]++' | while read -r module; do
	cp "$module" "$initramfs/modules/"
	echo "${module##*/}" >>"$initramfs/modules/order"
done
cat >"$initramfs/init" <<'I'
#!/bin/sh
b=/bin/busybox
$b mount -t proc proc /proc; $b mount -t sysfs sys /sys; $b mount -t devtmpfs dev /dev
while read -r m; do $b insmod "/modules/$m"; done </modules/order
$b mount -t ext4 /dev/vda /mnt && echo "mounted ext4 of $(($($b cat /sys/block/vda/size) / 2048)) MiB"
echo written >/mnt/f && $b umount /mnt && $b mount -t ext4 /dev/vda /mnt && $b grep -q written /mnt/f && echo "wrote and read back"
$b umount /mnt
$b poweroff -f # a reboot sometimes ends in an endless loop with microvm under TCG
I
chmod +x "$initramfs/init"
(cd "$initramfs" && find . | busybox cpio -o -H newc 2>/dev/null) >"$vm/initrd"
# The processor's frequency, since microvm has no timer to measure it with.
khz=$(awk '/^cpu MHz/ { print int($4) * 1000; exit }' /proc/cpuinfo)
image vm test.disktemplate.io/vm:1 "$vm" "[\"/usr/bin/qemu-system-x86_64\", \"-nodefaults\", \"-no-user-config\", \"-no-reboot\", \"-display\", \"none\",
 \"-M\", \"microvm\", \"-accel\", \"tcg,thread=multi\", \"-cpu\", \"max\", \"-m\", \"256\", \"-kernel\", \"/boot/vmlinuz-$version\", \"-initrd\", \"/initrd\",
 \"-append\", \"console=ttyS0 quiet panic=-1 cryptomgr.notests tsc_early_khz=$khz\", \"-serial\", \"stdio\", \"-device\", \"virtio-blk-device,drive=d\"]"
