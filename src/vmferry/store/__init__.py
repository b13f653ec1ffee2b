"""The durable state of a daemon: jobs with their revisions, journals, incoming migrations, ledgers. SQLite."""
