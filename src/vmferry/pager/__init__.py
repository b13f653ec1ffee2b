"""The pagers of this host: starts, finds, drives and ends them. One process a VM and side, apart from the daemon."""
