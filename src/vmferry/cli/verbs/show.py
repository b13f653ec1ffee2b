"""Shows one migration, from either of its hosts: its state, its cause, what to type, and its events.

With --json it shows every field.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp

from vmferry.cli.exit_codes import ExitCode
from vmferry.cli.output import Output
from vmferry.client.api import open_api
from vmferry.client.follow import TERMINAL_PHASES
from vmferry.client.plain import age_words, duration_words, enum_word, limit_words, plain, size_words
from vmferry.client.progress import arrived, done_words, pace_words, phase_word
from vmferry.v1.migrations_pb2 import Migration
from vmferry.v1.migrations_pb2 import Phase as PhaseEnum

HELP = "show one migration"
EVENTS_SHOWN = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", metavar="ID", help="id of the migration")


async def run(args: argparse.Namespace, output: Output) -> ExitCode:
    async with open_api(args.api, args.timeout) as api:
        migration = await api.migration(args.id)
    if output.as_json:
        output.event(plain(migration))
        return ExitCode.OK
    output.text(headline(migration, time.time()))
    for name, value in lines(migration, time.time()):
        output.text(f"  {name:9} {value}")
    return ExitCode.OK


def headline(migration: Migration, now_s: float) -> str:
    """VM, phase and its age, both hosts, id."""
    since = _seconds(migration.phase_time)
    age = f" for {age_words(now_s - since)}" if since and migration.phase not in TERMINAL_PHASES else ""
    hosts = f"{migration.source_host or '?'} → {migration.destination_host or migration.destination or '?'}"
    return f"{migration.vm}  {phase_word(migration)}{age}  {hosts}  {migration.migration_id}"


def lines(migration: Migration, now_s: float) -> Iterator[tuple[str, str]]:
    """The lines below the headline, as (name, value). Lines without a value are left out."""
    if migration.reason or migration.reason_code:
        yield "why", f"{migration.reason}  [{migration.reason_code}]".strip()
    for step in migration.steps:
        until = _clock(step.deadline)
        yield "waits", f"for {step.what} on {step.host}, {age_words(now_s - _seconds(step.start_time))}, until {until}"
    yield from _guest(migration, now_s)
    yield from _memory(migration, now_s)
    yield from _course(migration)
    for pager in migration.pagers:
        life = "alive" if pager.alive else pager.exit or "has ended"
        use = f"{pager.cpu_s:.1f} s CPU, {size_words(pager.memory_bytes)}"
        yield "pager", f"{pager.role} on {pager.host}, pid {pager.pid}, {life}, {use}"
    if migration.requested_by:
        yield "asked by", migration.requested_by
    if migration.command:
        yield "now", f"{migration.command}   see {migration.runbook}"
    for event in migration.events[-EVENTS_SHOWN:]:
        yield "event", event_words(event.time, event.host, event.kind, event.words)


def _guest(migration: Migration, now_s: float) -> Iterator[tuple[str, str]]:
    page = migration.progress
    if page.waiting_faults:
        oldest = age_words(now_s - page.oldest_fault_since_us / 1e6) if page.oldest_fault_since_us else "unknown"
        vcpus = "1 vCPU waits" if page.waiting_faults == 1 else f"{page.waiting_faults} vCPUs wait"
        yield "guest", f"{vcpus}, oldest {oldest}"
    for name, touch in (("10 s", page.recent_first_touch), ("whole", page.first_touch)):
        if touch.count:
            figures = f"p50 {touch.p50_us:.0f} µs, p99 {touch.p99_us:.0f} µs, {touch.count} faults"
            yield "touches", f"{name}: {figures}"
    if page.machine_checks or migration.memory_errors:
        yield "errors", f"{migration.memory_errors} memory errors, {page.machine_checks} machine checks here"


def _memory(migration: Migration, now_s: float) -> Iterator[tuple[str, str]]:
    page = migration.progress
    if not page.total:
        return
    words = f"{done_words(migration)}  {arrived(migration)} of {page.total} pages, {size_words(page.bytes_received)}"
    if migration.phase not in TERMINAL_PHASES:
        words += f", {pace_words(migration)}, limit {limit_words(migration.push_bytes_per_s)}"
        if page.last_page_us:
            words += f", last page {age_words(now_s - page.last_page_us / 1e6)} ago"
    yield "memory", words
    yield "came by", f"demand {page.demand}, push {page.push}, zero {page.zero}, poison {page.poison}"


def _course(migration: Migration) -> Iterator[tuple[str, str]]:
    spans = [
        f"{enum_word(PhaseEnum.DESCRIPTOR, span.phase).lower()} {duration_words(span.duration_s)}"
        for span in migration.phases
        if span.phase not in TERMINAL_PHASES
    ]
    if spans:
        yield "phases", " · ".join(spans)
    if migration.downtime_s:
        yield "downtime", duration_words(migration.downtime_s)
    for part in migration.blackout:
        yield "", f"{duration_words(part.duration_s):>9}  {part.name}"
    if migration.phase in TERMINAL_PHASES:
        yield "total", duration_words(migration.total_s)


def event_words(at: Timestamp, host: str, kind: str, words: str) -> str:
    """An event in one line."""
    return f"{_clock(at)}  {host}  {kind}  {words}".rstrip()


def _clock(at: Timestamp) -> str:
    return datetime.fromtimestamp(_seconds(at), UTC).strftime("%H:%M:%S.%f")[:-3] + "Z"


def _seconds(at: Timestamp) -> float:
    return at.ToMicroseconds() / 1e6
