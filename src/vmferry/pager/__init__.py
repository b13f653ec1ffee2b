"""The pagers of this host: starts, finds, calls and ends them. A pager is one process per VM and side."""
