"""The ledger: the memory errors of each VM."""
