#!/bin/busybox sh
# The first process of a guest: mounts the host's files, runs the script in them, says how it ended, and turns the machine off.
bb=/bin/busybox
failed() {
    echo "init: $1 failed" >/dev/console
    $bb poweroff -f
}
$bb mount -t devtmpfs dev /dev || failed "mounting /dev"
for module in /modules/*; do
    $bb insmod "$module" || failed "loading $module"
done
options=trans=virtio,version=9p2000.L,ro,msize=512000,cache=loose
$bb mount -t 9p -o $options root /root || failed "mounting the host's files"
cd /root || failed "entering the host's files"
$bb mount -t proc proc proc || failed "mounting /proc"
$bb mount -t sysfs sys sys || failed "mounting /sys"
$bb mount --bind /dev dev || failed "mounting the guest's /dev"
$bb mount -t tmpfs tmp tmp || failed "mounting /tmp"
$bb mount -t tmpfs run run || failed "mounting /run"
$bb mount -t cgroup2 cgroup sys/fs/cgroup || failed "mounting cgroup v2"
$bb mount -t bpf bpf sys/fs/bpf || failed "mounting the bpffs"
$bb mkdir -p run/netns ./@TARGET@
$bb mount -t 9p -o $options target ./@TARGET@ || failed "mounting what was built"
$bb cp /script run/script
$bb ip link set lo up
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp
# By a pipe: what finds a terminal colours its words.
{
    $bb chroot /root /bin/sh /run/script
    echo "@ENDED@ $?"
} 2>&1 | $bb cat >/dev/ttyS1
$bb poweroff -f
