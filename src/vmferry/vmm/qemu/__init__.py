"""The adapter for an unmodified QEMU, behind the same port as a VMM that speaks the VMM protocol."""
