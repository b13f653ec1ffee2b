"""Fakes of the ports, for tests of this project and of those who build on it. They run through the same contract tests
as the real adapters.

    script.py   what fails, hangs or is lost, and where; the transcript of what was done
    clock.py    ManualClock
    store.py    MemoryStore
    vmm.py      FakeVmm, FakeVmms
    pager.py    FakePager, FakePagers
    peer.py     FakePeers: another daemon's arrivals, over a wire that can be cut
"""
