"""Asyncio building blocks. They know nothing of migrations."""
