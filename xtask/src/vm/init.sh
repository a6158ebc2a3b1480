#!/bin/busybox sh
# PID 1 of the virtual machine: mounts what the agent needs, loads every kernel program, reports, powers off.
bb=/bin/busybox
$bb mount -t proc proc /proc
$bb mount -t sysfs sysfs /sys
$bb mount -t devtmpfs dev /dev
$bb mount -t tmpfs tmpfs /run
$bb mount -t tmpfs tmpfs /tmp
$bb mount -t bpf bpf /sys/fs/bpf
$bb mount -t cgroup2 cgroup2 /sys/fs/cgroup
$bb ip link set lo up
echo 1 >/proc/sys/net/core/bpf_jit_enable
echo "VM-KERNEL $($bb uname -r)"
/bin/weir-agent verify
echo "VM-STATUS $?"
$bb poweroff -f
