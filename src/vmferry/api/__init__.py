"""The control plane's gRPC services: thin servicers over the Protocols of `control.py`."""
