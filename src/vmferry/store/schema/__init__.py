"""The schema for alembic. It runs at every opening of the store and upgrades an older state directory."""
