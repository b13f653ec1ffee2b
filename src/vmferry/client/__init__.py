"""A control plane's side of the public gRPC API: what the CLI, the demo and the scenario tests share.

It knows the API only by the generated `vmferry.v1`; nothing of the daemon is imported, so that what works here works
for any client.
"""
