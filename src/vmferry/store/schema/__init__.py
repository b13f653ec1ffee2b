"""alembic's home: run at every opening of the store, so that a newer vmferry finds an older state directory usable."""
