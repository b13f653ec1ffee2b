"""A network of our own: an emulator between two namespaces, daemons in them, and what may happen to both."""
