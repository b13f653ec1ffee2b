"""Conversions between `common.proto` and `model/`. Pure.

The adapters that must not know each other (`vmm`, `pager`, `peer`) and `api` share them. Incoming values are checked
here once. An error names the field by its path in the message, e.g. `layout.regions[1].size`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vmferry.errors import Reason, VmferryError
from vmferry.model.allocation import HELD_MAX, held_problem
from vmferry.model.memory import Backing, MemoryLayout, MemoryRegion, PageRange, layout_problem
from vmferry.model.memory_error import LedgerEntry, Origin, Severity
from vmferry.model.migration import Latency, PageProgress
from vmferry.units import LSB_4K, Gpa
from vmferry.v1 import common_pb2 as pb

_BACKING_TO_PB = {Backing.ANONYMOUS: pb.BACKING_ANONYMOUS, Backing.MEMFD: pb.BACKING_MEMFD}
_BACKING_FROM_PB = {number: backing for backing, number in _BACKING_TO_PB.items()}
_ORIGIN_TO_PB = {
    Origin.VMM: pb.ERROR_ORIGIN_VMM,
    Origin.OPERATOR: pb.ERROR_ORIGIN_OPERATOR,
    Origin.READ: pb.ERROR_ORIGIN_READ,
    Origin.LOST: pb.ERROR_ORIGIN_LOST,
    Origin.DESTINATION: pb.ERROR_ORIGIN_DESTINATION,
}
_ORIGIN_FROM_PB = {number: origin for origin, number in _ORIGIN_TO_PB.items()}
_SEVERITY_TO_PB = {
    None: pb.SEVERITY_UNSPECIFIED,
    Severity.ACTION_OPTIONAL: pb.SEVERITY_ACTION_OPTIONAL,
    Severity.ACTION_REQUIRED: pb.SEVERITY_ACTION_REQUIRED,
}
_SEVERITY_FROM_PB = {number: severity for severity, number in _SEVERITY_TO_PB.items()}


def invalid(field: str, message: str) -> VmferryError:
    """An INVALID_ARGUMENT that names the field, for the caller to raise."""
    return VmferryError(Reason.INVALID_ARGUMENT, f"{field}: {message}.", f"Correct {field} in the request.")


def layout_to_pb(layout: MemoryLayout) -> pb.MemoryLayout:
    return pb.MemoryLayout(
        regions=[
            pb.MemoryRegion(
                gpa=region.gpa,
                size=region.size,
                page_size=region.page_size,
                backing=_BACKING_TO_PB[region.backing],
            )
            for region in layout.regions
        ]
    )


def layout_from_pb(message: pb.MemoryLayout, field: str = "layout") -> MemoryLayout:
    """Raises: VmferryError INVALID_ARGUMENT, naming the first field that is wrong."""
    regions = []
    for index, region in enumerate(message.regions):
        backing = _BACKING_FROM_PB.get(region.backing)
        if backing is None:
            raise invalid(f"{field}.regions[{index}].backing", f"{region.backing} is neither ANONYMOUS nor MEMFD")
        regions.append(MemoryRegion(Gpa(region.gpa), region.size, region.page_size, backing))
    layout = MemoryLayout(tuple(regions))
    problem = layout_problem(layout)
    if problem is not None:
        raise invalid(f"{field}.{problem[0]}", problem[1])
    return layout


def ranges_to_pb(ranges: Iterable[PageRange]) -> list[pb.PageRange]:
    return [pb.PageRange(region=one.region, page=one.page, count=one.count) for one in ranges]


def ranges_from_pb(messages: Iterable[pb.PageRange]) -> tuple[PageRange, ...]:
    """The ranges as received. They are not checked against a layout."""
    return tuple(PageRange(one.region, one.page, one.count) for one in messages)


def held_from_pb(messages: Sequence[pb.PageRange], layout: MemoryLayout, field: str = "held") -> tuple[PageRange, ...]:
    """Raises: VmferryError INVALID_ARGUMENT, naming the first range that is not in the layout, or out of order."""
    if len(messages) > HELD_MAX:
        raise invalid(field, f"has {len(messages)} ranges, may have {HELD_MAX}")
    held = ranges_from_pb(messages)
    problem = held_problem(held, layout)
    if problem is not None:
        raise invalid(f"{field}[{problem[0]}].{problem[1]}", problem[2])
    return held


def error_to_pb(entry: LedgerEntry) -> pb.MemoryError:
    return pb.MemoryError(
        gpa=entry.gpa,
        lsb=entry.lsb,
        origin=_ORIGIN_TO_PB[entry.origin],
        severity=_SEVERITY_TO_PB[entry.severity],
        guest_visible=entry.guest_visible,
        hop=entry.hop,
        count=entry.count,
        first_seen_us=entry.first_seen_us,
        last_seen_us=entry.last_seen_us,
        replacements=entry.replacements,
        replaced=entry.replaced,
    )


def error_from_pb(message: pb.MemoryError, field: str = "error") -> LedgerEntry:
    """An `lsb` of 0 means a 4 KiB page, a `count` of 0 means one: proto3 leaves unset numbers 0.

    Raises: VmferryError INVALID_ARGUMENT.
    """
    origin = _ORIGIN_FROM_PB.get(message.origin)
    if origin is None:
        raise invalid(f"{field}.origin", f"{message.origin} is not a known origin of a memory error")
    if message.severity not in _SEVERITY_FROM_PB:
        raise invalid(f"{field}.severity", f"{message.severity} is not a known severity")
    return LedgerEntry(
        gpa=Gpa(message.gpa),
        origin=origin,
        lsb=message.lsb or LSB_4K,
        severity=_SEVERITY_FROM_PB[message.severity],
        guest_visible=message.guest_visible,
        hop=message.hop,
        count=message.count or 1,
        first_seen_us=message.first_seen_us,
        last_seen_us=message.last_seen_us,
        replacements=message.replacements,
        replaced=message.replaced,
    )


def progress_to_pb(progress: PageProgress) -> pb.PageProgress:
    return pb.PageProgress(
        total=progress.total,
        absent=progress.absent,
        demand=progress.demand,
        push=progress.push,
        zero=progress.zero,
        poison=progress.poison,
        discarded=progress.discarded,
        bytes_received=progress.bytes_received,
        faults=progress.faults,
        duplicate_faults=progress.duplicate_faults,
        machine_checks=progress.machine_checks,
        first_touch=_latency_to_pb(progress.first_touch),
        waiting_faults=progress.waiting_faults,
        oldest_wait_us=progress.oldest_wait_us,
        oldest_fault_since_us=progress.oldest_fault_since_us,
        last_page_us=progress.last_page_us,
        rate_bytes_per_s=progress.rate_bytes_per_s,
        remaining_s=progress.remaining_s,
        recent_first_touch=_latency_to_pb(progress.recent_first_touch),
    )


def progress_from_pb(message: pb.PageProgress) -> PageProgress:
    return PageProgress(
        total=message.total,
        absent=message.absent,
        demand=message.demand,
        push=message.push,
        zero=message.zero,
        poison=message.poison,
        discarded=message.discarded,
        bytes_received=message.bytes_received,
        faults=message.faults,
        duplicate_faults=message.duplicate_faults,
        machine_checks=message.machine_checks,
        first_touch=_latency_from_pb(message.first_touch),
        waiting_faults=message.waiting_faults,
        oldest_wait_us=message.oldest_wait_us,
        oldest_fault_since_us=message.oldest_fault_since_us,
        last_page_us=message.last_page_us,
        rate_bytes_per_s=message.rate_bytes_per_s,
        remaining_s=message.remaining_s,
        recent_first_touch=_latency_from_pb(message.recent_first_touch),
    )


def _latency_to_pb(latency: Latency) -> pb.LatencySummary:
    return pb.LatencySummary(
        count=latency.count,
        p50_us=latency.p50_us,
        p90_us=latency.p90_us,
        p99_us=latency.p99_us,
        max_us=latency.max_us,
        buckets=latency.buckets,
        sum_us=latency.sum_us,
    )


def _latency_from_pb(message: pb.LatencySummary) -> Latency:
    return Latency(
        count=message.count,
        p50_us=message.p50_us,
        p90_us=message.p90_us,
        p99_us=message.p99_us,
        max_us=message.max_us,
        buckets=tuple(message.buckets),
        sum_us=message.sum_us,
    )
