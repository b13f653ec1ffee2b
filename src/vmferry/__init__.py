"""vmferry moves a running virtual machine by postcopy and keeps its memory errors."""
