"""A ledger belongs to one life of a VM: another process that did not receive the VM has other memory."""

from __future__ import annotations

import os
import subprocess
import sys

from vmferry.migration.environment import process_life
from vmferry.model.memory_error import LedgerEntry, Origin
from vmferry.model.migration import Phase
from vmferry.testing.host import Pair
from vmferry.units import Gpa

BAD = LedgerEntry(Gpa(0x5000), Origin.VMM, first_seen_us=3, last_seen_us=3)
OTHER = LedgerEntry(Gpa(0x9000), Origin.VMM, first_seen_us=4, last_seen_us=4)


async def test_errors_of_a_vm_that_ended_do_not_poison_its_successor(pair: Pair) -> None:
    await pair.service.record_vmm_errors("web", [BAD])
    pair.source.die("ended")
    pair.source = pair.a.add_vmm("web", "running", 101)
    await pair.service.create("m1", "web", "b")
    job = await pair.a.job_where("m1")
    assert (job.phase, job.memory_errors, job.progress.poison) == (Phase.COMPLETED, 0, 0)
    assert "pager.mark_poisoned" not in pair.a.script.transcript + pair.b.script.transcript
    assert await pair.b.store.ledger("web") == []


async def test_the_first_error_of_a_successor_is_not_taken_for_an_old_one(pair: Pair) -> None:
    await pair.service.record_vmm_errors("web", [BAD])
    pair.source.die("ended")
    pair.a.add_vmm("web", "running", 101)
    await pair.service.record_vmm_errors("web", [OTHER])
    assert await pair.service.ledger("web") == [OTHER]
    assert [change[2] for change in pair.a.store._ledger] == [BAD, OTHER]  # the old one stays as history
    assert [change[2] for change in await pair.a.store.ledger_changes("", 0, 10)] == [OTHER]


async def test_a_vmm_that_connects_again_keeps_its_ledger(pair: Pair) -> None:
    await pair.service.record_vmm_errors("web", [BAD])
    pair.source.die("connection broke")
    pair.source = pair.a.add_vmm("web", "running", 100)
    assert await pair.service.ledger("web") == [BAD]
    await pair.a.kill()
    await pair.a.start()
    assert await pair.service.ledger("web") == [BAD]


async def test_a_vm_that_moved_in_keeps_its_ledger(pair: Pair) -> None:
    await pair.service.record_vmm_errors("web", [BAD])
    await pair.service.create("m1", "web", "b")
    await pair.a.job_where("m1")
    await pair.b.kill()
    there = await pair.b.start()
    assert [entry.gpa for entry in await there.ledger("web")] == [BAD.gpa]
    await pair.b.kill()
    there = await pair.b.start()
    assert [entry.gpa for entry in await there.ledger("web")] == [BAD.gpa]
    pair.destination.die("ended")
    pair.b.add_vmm("web", "running", 201)
    assert await there.ledger("web") == []


async def test_a_vm_whose_arrival_was_lost_leaves_no_errors_behind(pair: Pair) -> None:
    await pair.service.record_vmm_errors("web", [BAD])
    pair.b.pagers.arrives = False
    await pair.service.create("m1", "web", "b")
    await pair.a.job_where("m1", phases=frozenset({"POSTCOPY"}))
    pair.destination.die("oom")
    pair.b.add_vmm("web", "running", 201)
    assert pair.b.service is not None
    assert await pair.b.service.ledger("web") == []


def test_a_life_is_one_process() -> None:
    own = process_life(os.getpid())
    assert own.startswith(f"{os.getpid()} ")
    assert process_life(os.getpid()) == own
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        first = process_life(child.pid)
        assert first.split()[1] != own.split()[1]
        child.kill()
        child.wait()
        assert process_life(child.pid) == ""
