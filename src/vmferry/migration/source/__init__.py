"""A migration on its source: pure state machine, and what runs it."""
