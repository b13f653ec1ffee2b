"""Real daemons, pagers and guests on this machine."""
