"""Fakes of the ports, for the tests of this project and of projects that build on it. The contract tests run both the
fakes and the real adapters.

    script.py   planned failures, hangs and lost answers, and the transcript of all steps
    clock.py    ManualClock
    store.py    MemoryStore
    vmm.py      FakeVmm, FakeVmms
    pager.py    FakePager, FakePagers
    peer.py     FakePeers: another daemon's destination side, over a wire that can be cut
"""
