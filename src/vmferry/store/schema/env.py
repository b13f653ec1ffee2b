"""The script that alembic runs: it upgrades over the connection that the store opened."""

from __future__ import annotations

from alembic import context

from vmferry.store.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
