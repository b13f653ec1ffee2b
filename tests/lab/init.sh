#!/bin/bash
# The guest's first process: an overlay over the host's root, then system.sh in it.
# The kernel's command line sets LAB_TOOLS, LAB_KERNEL (a folder with lib/modules) and LAB_HERE (this folder).
export PATH=$LAB_TOOLS:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
overlay=/mnt
mount -t tmpfs -o size=75% lab $overlay
mkdir $overlay/upper $overlay/work $overlay/root
mount -t proc proc /proc
mount -t sysfs sysfs /sys
for module in overlay kvm_amd; do modprobe -d "$LAB_KERNEL" $module || echo "lab: no module $module"; done
mount -t overlay -o lowerdir=/,upperdir=$overlay/upper,workdir=$overlay/work overlay $overlay/root
cd $overlay/root || exit
mkdir -p old out lib/modules
mount -t virtiofs out out
mount -t devtmpfs dev dev
mkdir -p dev/pts dev/shm
mount -t devpts devpts dev/pts
for folder in dev/shm run; do mount -t tmpfs tmpfs $folder; done
mkdir -p run/lock
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t debugfs debugfs sys/kernel/debug
mount -t tracefs tracefs sys/kernel/tracing
mount -t cgroup2 cgroup2 sys/fs/cgroup
ln -sfn "$LAB_KERNEL/lib/modules/$(uname -r)" "lib/modules/$(uname -r)"
umount /proc /sys
# No chroot: a process in one may make no user namespace.
pivot_root . old
exec chroot . /bin/bash "$LAB_HERE/system.sh" <dev/hvc0 >dev/hvc0 2>&1
