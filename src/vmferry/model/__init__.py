"""Frozen values shared by the core and its adapters. No I/O."""
