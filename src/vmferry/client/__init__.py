"""A client of the public gRPC API, which the CLI, the demo and the scenario tests share.

It knows the API only by the generated `vmferry.v1` and imports nothing of the daemon, so any client can do the same.
"""
