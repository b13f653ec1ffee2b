"""A blackout has a limit before the commit. It carries only what is new since Prepare."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.support.moves import before, come
from vmferry.errors import Reason, VmferryError
from vmferry.migration.source import steps
from vmferry.model import vmm as vmm_model
from vmferry.model.memory_error import LedgerEntry, Origin
from vmferry.model.migration import Job, Phase
from vmferry.testing.host import FakeHost, Pair
from vmferry.units import PAGE_4K, Gpa

SHORT_S = 0.05
"""Every blackout of these tests exceeds it, because a step hangs."""


async def hasty(pair: Pair) -> None:
    """Gives the source the short limit."""
    await pair.a.kill()
    pair.a.timeouts = replace(pair.a.timeouts, downtime_s=SHORT_S)
    await pair.a.start()


async def home(pair: Pair) -> Job:
    """Waits until the VM runs on the source again and the job has ended."""
    await come(lambda: "vmm.resume" in pair.a.script.transcript and pair.source.runs)
    job = await pair.a.job_where("m1")
    assert (job.phase, job.reason_code) == (Phase.FAILED, Reason.DOWNTIME_EXCEEDED)
    assert "timeouts.downtime_s" in job.reason
    assert not pair.destination.runs
    return job


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ("vmm.stop", "the VMM on a to stop"),
        ("vmm.save_state", "the VMM on a to save its device state"),
        ("pager.freeze", "the pager on a to serve pages"),
        ("store.journal commit", "the store of a to keep the commit"),
        ("peer.ready", "the destination b to get ready"),
        ("peer.ready answered", "the destination b to get ready"),
    ],
)
async def test_a_step_that_hangs_brings_the_vm_home_and_is_named(pair: Pair, step: str, words: str) -> None:
    await hasty(pair)
    pair.a.script.hang_at(step, after=step == "vmm.stop")
    await pair.service.create("m1", "web", "b")
    assert words in (await home(pair)).reason
    assert "peer.start" not in pair.a.script.transcript


@pytest.mark.parametrize("step", ["store.reserve", "vmm.load_state"])
async def test_a_destination_that_hangs_brings_the_vm_home(pair: Pair, step: str) -> None:
    await hasty(pair)
    pair.b.script.hang_at(step)
    await pair.service.create("m1", "web", "b")
    assert "the destination b to get ready" in (await home(pair)).reason
    await come(pair.nothing_left)


async def test_the_vm_does_not_wait_for_a_pager_that_hangs_on_the_way_back(pair: Pair) -> None:
    pair.a.script.fail_at("pager.freeze", VmferryError(Reason.PAGER_FAILED, "no answer."))
    pair.a.script.hang_at("pager.thaw")
    await pair.service.create("m1", "web", "b")
    await pair.a.script.hung.wait()
    assert pair.source.runs


async def test_the_vm_does_not_wait_for_a_journal_without_a_commit(pair: Pair) -> None:
    await hasty(pair)
    pair.a.script.fail_at("vmm.save_state", VmferryError(Reason.VMM_REFUSED, "no."))
    pair.a.script.hang_at("store.journal aborted")
    pair.a.script.hang_at("pager.freeze")
    await pair.service.create("m1", "web", "b")
    await come(lambda: "vmm.resume" in pair.a.script.transcript)
    assert "store.journal commit" not in pair.a.script.transcript
    assert pair.source.runs


async def test_a_store_that_hangs_on_its_commit_brings_the_vm_home_by_the_destinations_refusal(pair: Pair) -> None:
    """The commit may be durable. The destination's `refused` is, before the VM runs."""
    await hasty(pair)
    pair.a.script.hang_at("store.journal commit", after=True)
    pair.a.script.hang_at("store.journal aborted")
    pair.a.script.hang_at("vmm.resume", after=True)
    await pair.service.create("m1", "web", "b")
    await come(lambda: pair.source.runs and "vmm.resume" in pair.a.script.transcript)
    assert "commit" in pair.a.store.kinds()
    assert "aborted" not in pair.a.store.kinds()
    assert "refused" in pair.b.store.kinds()
    await pair.a.kill()
    await pair.a.start()
    assert (await pair.a.job_where("m1")).phase is Phase.FAILED
    assert pair.source.runs


async def test_both_journals_are_reserved_during_the_blackout_only(pair: Pair) -> None:
    pair.a.script.hang_at("peer.start")
    await pair.service.create("m1", "web", "b")
    await pair.a.script.hung.wait()
    assert (pair.a.store.reserved, pair.b.store.reserved) == ({"m1-source"}, {"m1-destination"})
    assert before(pair.a.script.transcript, "store.reserve", "vmm.stop")
    pair.a.script.release()
    await pair.a.job_where("m1")
    assert not pair.a.store.reserved | pair.b.store.reserved


@pytest.mark.parametrize("step", ["vmm.save_state", "pager.freeze", "store.journal commit", "peer.ready"])
async def test_a_move_that_failed_reserves_nothing(pair: Pair, step: str) -> None:
    pair.a.script.fail_at(step, VmferryError(Reason.VMM_REFUSED, "no."))
    await pair.service.create("m1", "web", "b")
    await pair.a.job_where("m1")
    assert not pair.a.store.reserved | pair.b.store.reserved


async def test_a_store_that_is_locked_fails_the_move_while_the_vm_runs(pair: Pair) -> None:
    pair.a.script.fail_at("store.reserve", VmferryError(Reason.STORE_FAILED, "database is locked."))
    await pair.service.create("m1", "web", "b")
    assert (await pair.a.job_where("m1")).reason_code is Reason.STORE_FAILED
    assert "vmm.stop" not in pair.a.script.transcript
    assert pair.source.runs


async def test_a_destination_that_cannot_write_is_not_ready(pair: Pair) -> None:
    """Without space for `running` there, the VM would be stopped until there is."""
    full = VmferryError(Reason.STORE_FAILED, "the store of b: disk is full.")
    pair.b.script.fail_at("store.reserve", full)
    await pair.service.create("m1", "web", "b")
    job = await pair.a.job_where("m1")
    assert (job.phase, job.reason_code) == (Phase.FAILED, Reason.STORE_FAILED)
    assert "the store of b: disk is full" in job.reason
    assert pair.source.runs
    await come(pair.nothing_left)


def errors(count: int, first: int = 0) -> list[LedgerEntry]:
    pages = range(first, first + count)
    return [LedgerEntry(Gpa(page * PAGE_4K), Origin.VMM, first_seen_us=1, last_seen_us=1) for page in pages]


def in_blackout(host: FakeHost, first: str, last: str) -> list[str]:
    steps = host.script.transcript
    return steps[steps.index(first) : steps.index(last)]


async def test_a_large_ledger_is_not_inside_the_blackout(pair: Pair) -> None:
    await pair.service.record_vmm_errors("web", errors(20_000))
    await pair.service.create("m1", "web", "b")
    assert (await pair.a.job_where("m1")).phase is Phase.COMPLETED
    here = in_blackout(pair.a, "vmm.stop", "peer.start answered")
    there = in_blackout(pair.b, "vmm.load_state", "vmm.start")
    assert "pager.mark_poisoned" not in here
    assert "pager.mark_poisoned" not in there
    assert "store.errors" not in here + there
    assert pair.b.script.transcript.count("store.errors") == 1
    assert len(await pair.b.store.ledger("web")) == 20_000


async def test_the_blackout_carries_poison_new_since_prepare(pair: Pair) -> None:
    assert pair.b.service is not None
    await pair.service.record_vmm_errors("web", errors(3))
    pair.a.script.hang_at("vmm.stop")
    carried: list[LedgerEntry] = []
    incoming = pair.b.service.incoming
    ready = incoming.ready

    async def note(migration: str, device_state: bytes, ledger: list[LedgerEntry]) -> None:
        carried.extend(ledger)
        await ready(migration, device_state, ledger)

    incoming.ready = note  # type: ignore[method-assign, assignment]
    await pair.service.create("m1", "web", "b")
    await pair.a.script.hung.wait()
    source, destination = pair.a.pagers.running["m1-source"], pair.b.pagers.running["m1-destination"]
    assert len(source.poisoned) == len(destination.poisoned) == 3
    await pair.service.record_vmm_errors("web", errors(1, first=9))
    source.poisoned.pop(9 * PAGE_4K)  # A pager that did not hear of it is told again.
    pair.a.script.release()
    await pair.a.job_where("m1")
    assert carried == errors(1, first=9)
    assert 9 * PAGE_4K in source.poisoned
    assert 9 * PAGE_4K in destination.poisoned


async def test_a_device_state_that_cannot_travel_is_told_with_its_size(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "DEVICE_STATE_LIMIT", 5)
    monkeypatch.setattr(vmm_model, "DEVICE_STATE_LIMIT", 5)
    await pair.service.create("m1", "web", "b")
    job = await pair.a.job_where("m1")
    assert (job.phase, job.reason_code) == (Phase.FAILED, Reason.STATE_TOO_LARGE)
    assert "has 12 bytes, and at most 5 can move" in job.reason
    assert "peer.ready" not in pair.a.script.transcript
    assert pair.source.runs


async def test_a_clock_that_is_set_back_changes_no_duration(pair: Pair) -> None:
    pair.a.script.hang_at("vmm.stop")
    await pair.service.create("m1", "web", "b")
    await pair.a.script.hung.wait()
    pair.network.clock.advance(40)
    pair.network.clock.set_back(3600)
    pair.a.script.release()
    job = await pair.a.job_where("m1")
    assert job.phase is Phase.COMPLETED
    assert 40 <= job.total_s < 100
    assert job.ended_us >= job.created_us
    assert 0 <= job.downtime_s < 60
