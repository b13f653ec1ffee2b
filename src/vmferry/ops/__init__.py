"""The ops endpoint: health, readiness, metrics and the dashboard, over HTTP on an address of its own."""
