"""The memory message of a VMM to a destination's pager: accepted forms, and refusals that name the field."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import pytest

from tests.support.contract.destination_rig import Destination
from tests.support.contract.page_source import FIRST_PAGES, PAGES, Poison, expected
from tests.support.contract.vmm_child import PAGE, Json
from vmferry.v1 import common_pb2

LONGEST = 64 << 10
Change: TypeAlias = Callable[[Json], Any]


async def served(destination: Destination) -> None:
    """A VMM attaches as it should, and its touches are answered."""
    await destination.attach()
    await destination.connect()
    assert await destination.vmm.touch(1) == expected(1)


async def refused(destination: Destination, message: Json | bytes, descriptors: str, field: str) -> None:
    """The error names the field, the connection is closed, and the next VMM is served."""
    answer = await destination.vmm.answer(message, descriptors)
    assert answer["type"] == "error", answer
    assert answer["field"] == field
    assert answer["message"]
    await destination.vmm.line("closed")
    status = await destination.status_until(lambda status: bool(status.memory_reason))
    assert not status.memory_attached
    await served(destination)


def put(field: str, value: object) -> Change:
    return lambda message: message.update({field: value})


def put_in_region(field: str, value: object) -> Change:
    return lambda message: message["regions"][1].update({field: value})


def drop(field: str) -> Change:
    return lambda message: message.pop(field)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        pytest.param(put("version", 2), "version", id="version 2"),
        pytest.param(put("version", "one"), "version", id="version as text"),
        pytest.param(drop("version"), "version", id="no version"),
        pytest.param(put("vm", "web-2"), "vm", id="another vm"),
        pytest.param(put("vm", 7), "vm", id="vm as number"),
        pytest.param(put("role", "source"), "role", id="a source"),
        pytest.param(put("pid", -1), "pid", id="negative pid"),
        pytest.param(drop("pid"), "pid", id="no pid"),
        pytest.param(put("uffd", "0"), "uffd", id="uffd as text"),
        pytest.param(drop("uffd"), "uffd", id="no uffd"),
        pytest.param(put("uffd", 1), "uffd", id="descriptor not sent"),
        pytest.param(put("regions", {}), "regions", id="regions as object"),
        pytest.param(drop("regions"), "regions", id="no regions"),
        pytest.param(lambda message: message["regions"].pop(), "regions", id="a region too few"),
        pytest.param(lambda m: m["regions"].append(m["regions"][0]), "regions", id="a region too many"),
        pytest.param(put("regions", [7, 8]), "regions[0]", id="a number for a region"),
        pytest.param(put_in_region("size", PAGE), "regions[1].size", id="size"),
        pytest.param(put_in_region("size", 1.5), "regions[1].size", id="broken size"),
        pytest.param(put_in_region("page_size", 2 << 20), "regions[1].page_size", id="page size"),
        pytest.param(put_in_region("gpa", 0x200000), "regions[1].gpa", id="gpa"),
        pytest.param(put_in_region("backing", "memfd"), "regions[1].backing", id="backing"),
        pytest.param(put_in_region("backing", None), "regions[1].backing", id="backing null"),
        pytest.param(
            put_in_region("base_host_virt_addr", "0x1000"), "regions[1].base_host_virt_addr", id="address as text"
        ),
        pytest.param(
            put_in_region("base_host_virt_addr", 4097), "regions[1].base_host_virt_addr", id="address not aligned"
        ),
    ],
)
async def test_a_message_that_does_not_fit_is_refused(anonymous: Destination, change: Change, field: str) -> None:
    message = anonymous.message()
    change(message)
    await refused(anonymous, message, anonymous.descriptors, field)


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", id="not JSON"),
        pytest.param(b"\xff\xfe{}", id="not UTF-8"),
        pytest.param(b'"text"', id="neither object nor array"),
        pytest.param(b"{}{}", id="two values"),
        pytest.param(b"[" * 2000, id="deeply nested"),
    ],
)
async def test_bytes_that_are_no_message_are_refused(anonymous: Destination, message: bytes) -> None:
    await refused(anonymous, message, anonymous.descriptors, "message")


async def test_a_message_too_long_is_refused(anonymous: Destination) -> None:
    message = anonymous.message() | {"unknown": "x" * LONGEST}
    await refused(anonymous, message, anonymous.descriptors, "message")


@pytest.mark.parametrize(
    ("descriptors", "field"),
    [
        pytest.param("", "uffd", id="none"),
        pytest.param("n", "uffd", id="not a userfaultfd"),
        pytest.param("u" * 65, "descriptors", id="too many"),
        pytest.param("un", "descriptors", id="one that no field names"),
    ],
)
async def test_wrong_descriptors_are_refused(anonymous: Destination, descriptors: str, field: str) -> None:
    await refused(anonymous, anonymous.message(), descriptors, field)


@pytest.mark.parametrize("destination", ["memfd"], indirect=True)
@pytest.mark.parametrize(
    ("change", "descriptors", "field"),
    [
        pytest.param(lambda message: None, "u", "regions[0].fd", id="memfd not sent"),
        pytest.param(lambda message: message["regions"][1].pop("fd"), "um", "regions[1].fd", id="no fd"),
        pytest.param(lambda message: message["regions"][1].pop("offset"), "um", "regions[1].offset", id="no offset"),
        pytest.param(put_in_region("offset", PAGES * PAGE), "um", "regions[1].fd", id="beyond the file's end"),
        pytest.param(put_in_region("backing", "anonymous"), "um", "regions[1].backing", id="backing"),
    ],
)
async def test_a_memfd_that_does_not_fit_is_refused(
    destination: Destination, change: Change, descriptors: str, field: str
) -> None:
    message = destination.message()
    change(message)
    await refused(destination, message, descriptors, field)


async def test_unknown_fields_are_ignored(destination: Destination) -> None:
    message = destination.message() | {"colour": "blue"}
    message["regions"][0]["numa_node"] = 1
    answer = await destination.vmm.answer(message, destination.descriptors)
    assert answer["type"] == "attached", answer
    attached = (await destination.event("memory_attached")).memory_attached
    assert attached.vmm_pid == destination.vmm.process.pid
    status = await destination.status()
    assert (status.memory_attached, status.vmm_pid) == (True, destination.vmm.process.pid)


async def test_firecrackers_array_is_accepted_and_nothing_sent_back(anonymous: Destination) -> None:
    bad = FIRST_PAGES[1] + 4
    anonymous.source.poison = {bad: Poison(common_pb2.ERROR_ORIGIN_READ)}
    regions: list[Json] = []
    for first, end in ((FIRST_PAGES[1], PAGES), (0, FIRST_PAGES[1])):  # in any order
        region: Json = {"base_host_virt_addr": anonymous.vmm.hva + first * PAGE, "size": (end - first) * PAGE}
        regions.append(region | {"offset": first * PAGE, "page_size": PAGE, "page_size_kib": PAGE})
    await anonymous.vmm.send(regions, "u")
    assert (await anonymous.event("memory_attached")).memory_attached.vmm_pid == anonymous.vmm.process.pid
    await anonymous.connect()
    for page in (0, FIRST_PAGES[1] + 1):
        assert await anonymous.vmm.touch(page) == expected(page)
    assert await anonymous.vmm.touch(bad) == "sigbus"
    event = (await anonymous.event("memory_error")).memory_error
    assert not event.reported
    assert not [line for line in anonymous.vmm.said if line.startswith(("frame", "closed"))]
