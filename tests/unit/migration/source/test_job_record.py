"""A job's values: its task and a change of its limit write at the same time, and neither loses its value."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from vmferry.errors import Reason, VmferryError
from vmferry.migration.source.job_feed import JobFeed
from vmferry.migration.source.job_record import JobRecord
from vmferry.model.migration import Job, PageProgress, Phase
from vmferry.testing.clock import ManualClock
from vmferry.testing.script import Script
from vmferry.testing.store import MemoryStore

JOB = Job("m1", "web", "b", phase=Phase.POSTCOPY)
LIMIT = 50_000_000
PROGRESS = PageProgress(total=16, absent=3)


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore(Script())


@pytest.fixture
def record(store: MemoryStore) -> JobRecord:
    return JobRecord(JobFeed(store), ManualClock(), JOB)


async def test_a_save_keeps_the_limit_that_was_written_before_it(store: MemoryStore, record: JobRecord) -> None:
    store.script.hang_at("store.job POSTCOPY")
    changing = asyncio.create_task(record.save_push_limit(LIMIT))
    await store.script.hung.wait()
    saving = asyncio.create_task(record.save(replace(record.job, phase=Phase.COMPLETED)))
    store.script.release()
    await asyncio.gather(changing, saving)
    assert store.script.transcript == ["store.job POSTCOPY", "store.job COMPLETED"]
    assert (record.job.phase, record.job.push_bytes_per_s) == (Phase.COMPLETED, LIMIT)
    assert await store.job("m1") == record.job


async def test_a_limit_keeps_the_progress_that_comes_while_it_is_written(store: MemoryStore, record: JobRecord) -> None:
    store.script.hang_at("store.job POSTCOPY")
    changing = asyncio.create_task(record.save_push_limit(LIMIT))
    await store.script.hung.wait()
    record.show_progress(PROGRESS, 2)
    store.script.release()
    await changing
    job = record.job
    assert (job.push_bytes_per_s, job.progress, job.memory_errors, job.revision) == (LIMIT, PROGRESS, 2, 1)


async def test_a_quiet_change_is_durable_with_the_next_save(store: MemoryStore, record: JobRecord) -> None:
    record.stage(replace(record.job, downtime_s=0.1))
    assert await store.job("m1") is None
    await record.save_push_limit(LIMIT)
    stored = await store.job("m1")
    assert stored is not None
    assert (stored.downtime_s, stored.push_bytes_per_s) == (0.1, LIMIT)


async def test_a_save_that_failed_changes_nothing_here(store: MemoryStore, record: JobRecord) -> None:
    for phase in ("POSTCOPY", "COMPLETED"):
        store.script.fail_at(f"store.job {phase}", VmferryError(Reason.STORE_FAILED, "disk full."))
    with pytest.raises(VmferryError):
        await record.save_push_limit(LIMIT)
    with pytest.raises(VmferryError):
        await record.save(replace(record.job, phase=Phase.COMPLETED))
    assert record.job == JOB


async def test_the_same_limit_is_not_written_again(store: MemoryStore, record: JobRecord) -> None:
    await record.save_push_limit(LIMIT)
    await record.save_push_limit(LIMIT)
    assert store.script.transcript == ["store.job POSTCOPY"]


async def test_a_job_that_has_ended_takes_no_limit(record: JobRecord) -> None:
    await record.save(replace(record.job, phase=Phase.FAILED))
    with pytest.raises(VmferryError, match="m1 has ended") as caught:
        await record.save_push_limit(LIMIT)
    assert caught.value.reason is Reason.MIGRATION_ENDED
