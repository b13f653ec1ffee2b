"""The demo, and the stage on which it and the scenario tests play: real daemons and real guests on this machine."""
