"""A migration on its destination: a pure state machine and its runner."""
