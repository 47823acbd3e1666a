#!/bin/busybox sh
# Copyright The csi-disktemplate Authors.
# SPDX-License-Identifier: Apache-2.0

# Unpacks the archive on the disk "archive" into the filesystem $FS on the disk "target" or, if there is $OUTER, in the
# file volume.img of the filesystem $OUTER there. Says from when to when, in seconds since the boot. If a command fails,
# init ends, and the kernel panics.
set -eu
busybox=/bin/busybox
$busybox mkdir -p /dev /proc /sys /outer /volume
$busybox mount -t devtmpfs dev /dev
$busybox mount -t proc proc /proc
$busybox mount -t sysfs sys /sys
for module in /modules/*; do
	$busybox insmod "$module"
done
for disk in /sys/block/vd*; do
	read -r serial <"$disk/serial" || [ -n "$serial" ] # no newline follows it
	$busybox ln -s "/dev/${disk##*/}" "/dev/$serial"
done

target=/dev/target options=
if [ -n "${OUTER-}" ]; then
	$busybox mount -t "$OUTER" -o noatime "$target" /outer
	target=/outer/volume.img options=loop,
fi
read -r from _ </proc/uptime
$busybox mount -t "$FS" -o "${options}noatime" "$target" /volume
$busybox tar -x -f /dev/archive -C /volume
$busybox sync
$busybox umount /volume
read -r to _ </proc/uptime
echo "unpacked from $from to $to"
$busybox poweroff -f
