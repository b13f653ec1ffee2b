"""The ledger: the memory errors of each VM. Pure rules; the store keeps them."""
