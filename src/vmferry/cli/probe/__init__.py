"""What this host can do, found out by trying it: the checks of `vmferry doctor`."""
