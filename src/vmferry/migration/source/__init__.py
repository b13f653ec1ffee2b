"""A migration on its source: a pure state machine and its runner."""
