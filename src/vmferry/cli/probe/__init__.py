"""The checks of `vmferry doctor`. Each one tries an ability of this host."""
