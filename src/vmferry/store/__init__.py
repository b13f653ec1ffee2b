"""What must outlive the daemon: jobs with their revisions, journals, incoming migrations, ledgers. SQLite."""
