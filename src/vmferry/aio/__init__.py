"""Asyncio helpers that know nothing of migrations."""
