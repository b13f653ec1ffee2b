#!/bin/bash
# In the guest, on its final root: runs /out/.run/command, leaves its exit status in /out/.run/status, powers off.
umount -l /old 2>/dev/null
export HOME=/root LANG=C.UTF-8 TERM=dumb
hostname lab
ip link set lo up
for module in hwpoison_inject veth sch_netem sch_tbf; do modprobe $module || echo "lab: no module $module"; done
ulimit -n 1048576
echo "lab: Linux $(uname -r), up after $(cut -d' ' -f1 /proc/uptime) s"
setsid -w /bin/bash /out/.run/command
echo $? >/out/.run/status
sync
echo 1 >/proc/sys/kernel/sysrq
echo o >/proc/sysrq-trigger
sleep 100
