"""The frozen values that the core and its adapters share. No I/O."""
