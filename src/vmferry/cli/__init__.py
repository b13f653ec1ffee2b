"""The operator's program `vmferry`: one module a verb, all of them thin over `vmferry.client`."""

from vmferry.cli.program import main

__all__ = ["main"]
