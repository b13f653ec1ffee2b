"""The daemon's end of the VMM protocol's control socket (docs/reference/vmm-protocol.md)."""
