"""A stock Linux guest: Debian's cloud kernel with one process of our own, and a network with the test as other host."""
