#!/bin/bash
# Copyright The csi-disktemplate Authors.
# SPDX-License-Identifier: Apache-2.0

# Makes every image that the cluster runs, as docker-archive files in OUT, because
# there is no registry, and disk.qcow2, a disk that boots. BIN is the directory that
# build.sh printed. The plugin's own image comes from deploy/image.
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

# postgres, as far as the example uses it: the programs on PATH, and a user of the same number.
root=$scratch/postgres
cp -a "$scratch/busybox" "$root"
rm "$root/agnhost" "$root/bin/tar"
postgres=$(printf '%s\n' /usr/lib/postgresql/*/bin | sort -V | tail -1)
share=/usr/share/postgresql/$(basename "$(dirname "$postgres")")
mkdir -p "$root$postgres" "$root$share" "$root/usr/local/bin" "$root/usr/share"
cp -r "$share/." "$root$share"
cp -r /usr/share/zoneinfo "$root/usr/share/zoneinfo" # Debian's server reads the system's
for program in initdb pg_ctl postgres psql; do
	cp "$postgres/$program" "$root$postgres/$program"
	ln -s "$postgres/$program" "$root/usr/local/bin/$program"
done
cp -L /bin/tar "$root/bin/tar"
cp -L /usr/bin/zstd "$root/bin/zstd"
for file in "$root$postgres"/* "$root"/bin/{tar,zstd} "${postgres%/bin}"/lib/{plpgsql,dict_snowball}.so; do
	libraries=$(ldd "$file" | grep -oE '/[^ ]+' | sort -u)
	[[ $file == "$root"* ]] || libraries+=" $file"
	for library in $libraries; do
		[[ -e $root$library ]] || install -D -m 0755 "$library" "$root$library"
	done
done
echo 'postgres:x:999:999::/tmp:/bin/sh' >>"$root/etc/passwd"
echo 'postgres:x:999:' >>"$root/etc/group"
image postgres docker.io/library/postgres:15 "$root" null '["sh"]'

# QEMU that boots from a disk, with a BIOS and a shell. The example uses this name.
vm=$scratch/vm
"$here/../../deploy/image/rootfs.sh" "$vm" /bin/true
root=$scratch/qemu
cp -a "$scratch/busybox/." "$root"
cp -a "$vm/usr/." "$root/usr"
rm "$root/agnhost"
for firmware in /usr/share/seabios/bios-256k.bin /usr/share/qemu/kvmvapic.bin; do
	install -D -m 0644 "$firmware" "$root$firmware"
done
image qemu docker.io/tianon/qemu:7.2 "$root" null '["sh"]'

# An initramfs with busybox and the modules of virtio's disks, the first ones first.
kernel=$(basename "$vm"/boot/vmlinuz-*)
root=$scratch/initramfs
mkdir -p "$root"/{bin,dev,mnt,modules,proc,sys}
cp /bin/busybox "$root/bin/busybox"
ln -s busybox "$root/bin/sh"
for module in virtio_pci virtio_blk ext4; do
	modprobe --set-version "${kernel#vmlinuz-}" --show-depends "$module" | sed -n 's/^insmod \(\S*\).*/\1/p'
done | awk '!seen[$0]++' | while read -r module; do
	cp "$module" "$root/modules/"
	echo "${module##*/}" >>"$root/modules/order"
done

# A disk that boots by itself: a boot loader and a kernel on its first partition, an ext4
# on its second. A VM adds its disk's serial number to a file there, and shows the file.
# Then it runs each line that it reads from its second serial port, and answers with one
# line: the exit code, and what was printed. A VM without that port goes on and does nothing.
cat >"$root/init" <<'I'
#!/bin/sh
# Debian's busybox runs its own applets before programs on PATH, as /proc/self/exe. So they need no links, but /proc.
/bin/busybox mount -t proc proc /proc
mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
while read -r module; do insmod "/modules/$module"; done </modules/order
mount -t ext4 /dev/vda2 /mnt && echo "booted from a disk of $(($(cat /sys/block/vda/size) / 2048)) MiB"
cat /sys/block/vda/serial >>/mnt/names; echo >>/mnt/names
umount /mnt && mount -t ext4 /dev/vda2 /mnt && sed 's/^/name: /' /mnt/names
stty -F /dev/ttyS1 raw -echo
while read -r line; do
	answer=$(eval "$line" 2>&1 </dev/null)
	echo $? $answer >&0
done <>/dev/ttyS1
while :; do sleep 3600; done
I
chmod +x "$root/init"
(cd "$root" && find . | busybox cpio -o -H newc 2>/dev/null) >"$scratch/initrd"
disk=$scratch/disk
# Without no_timer_check a kernel panics that waits too long for a timer: many VMs share few processors here.
cat >"$scratch/syslinux.cfg" <<S
default linux
label linux
kernel linux
append initrd=initrd console=ttyS0 quiet loglevel=1 panic=-1 cryptomgr.notests no_timer_check
S
truncate --size 64M "$disk"
printf '%s\n' 'label: dos' '2048,98304,c,*' '100352,,83' | sfdisk --quiet "$disk"
dd if=/usr/lib/syslinux/mbr/mbr.bin of="$disk" conv=notrunc status=none
export MTOOLS_SKIP_CHECK=1
mformat -i "$disk@@1M" -T 98304 -h 64 -s 32 -H 2048
mcopy -i "$disk@@1M" "$vm/boot/$kernel" ::linux
mcopy -i "$disk@@1M" "$scratch/initrd" "$scratch/syslinux.cfg" ::
syslinux --offset 1048576 --install "$disk"
mkdir "$scratch/second"
echo everybody >"$scratch/second/names"
mkfs.ext4 -q -d "$scratch/second" -E offset=$((100352 * 512)) "$disk" 14M
qemu-img convert -O qcow2 -c "$disk" "$out/disk.qcow2"
