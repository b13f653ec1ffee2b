"""The benchmark: vmferry and QEMU move the same guest, in turn, on one machine in one run."""
