"""Daemon ⇄ daemon over gRPC: the source's client, the destination's servicer, and the one table of gRPC statuses."""
