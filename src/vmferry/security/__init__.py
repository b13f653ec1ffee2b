"""Identities, TLS connections, and rights: the name of each caller, and the calls that it may make."""
