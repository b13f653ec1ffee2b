"""The lab: runs tests on other kernels than the machine's own, in QEMU without any hardware's help (TCG).

`python -m tests.lab` runs the suites and prints a table. `python -m tests.lab.guest --kernel 6.12 -- COMMAND` runs a
command. Packages come by apt into a state of its own, under `target/lab`.
"""
