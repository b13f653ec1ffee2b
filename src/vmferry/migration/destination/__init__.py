"""A migration on its destination: pure state machine, and what runs it."""
