"""Daemon ⇄ daemon over gRPC: the source's client and the destination's servicer."""
