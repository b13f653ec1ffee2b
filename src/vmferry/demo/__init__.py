"""The demo, and its stage, which the scenario tests use too: real daemons and real guests on this machine."""
