"""The control plane's gRPC services: thin servicers over what `control.py` asks of the daemon."""
