"""The link of a destination's pager to its source: refused, lost, silent, and back."""

from __future__ import annotations

import grpc
import pytest

from tests.support.contract.destination_rig import Destination
from tests.support.contract.page_source import PAGES, PUSH_PAGES, expected
from vmferry.demo.patience import patient
from vmferry.v1 import pager_pb2

UP, DOWN, DONE = pager_pb2.LINK_STATE_UP, pager_pb2.LINK_STATE_DOWN, pager_pb2.LINK_STATE_DONE


async def test_a_refused_token_is_said(anonymous: Destination) -> None:
    await anonymous.attach()
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await anonymous.connect(token="wrong")
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert "not the lane's token" in (refused.value.details() or ""), "the source's own words"
    await anonymous.connect()
    assert await anonymous.vmm.touch(0) == expected(0)


async def test_a_source_that_is_not_there_is_unavailable(anonymous: Destination) -> None:
    await anonymous.attach()
    await anonymous.source.stop()
    with pytest.raises(grpc.aio.AioRpcError) as absent:
        await anonymous.connect()
    assert absent.value.code() is grpc.StatusCode.UNAVAILABLE
    assert anonymous.source.address in (absent.value.details() or "")
    await anonymous.source.start()
    await anonymous.connect()
    assert await anonymous.vmm.touch(0) == expected(0)


async def test_a_lane_without_full_packets_is_refused_with_the_cause(anonymous: Destination) -> None:
    """Small packets of the source arrive; a lane that opened would carry no page."""
    await anonymous.attach()
    anonymous.source.probes = False
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await anonymous.connect(connect_timeout_s=1.0)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "packets of" in (refused.value.details() or "")
    assert "MTU" in (refused.value.details() or "")
    anonymous.source.probes = True
    await anonymous.connect()
    assert await anonymous.vmm.touch(0) == expected(0)


async def test_lanes_need_the_memory(anonymous: Destination) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as early:
        await anonymous.connect()
    assert early.value.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_touches_wait_for_a_lost_source_to_come_back(destination: Destination) -> None:
    source, vmm = destination.source, destination.vmm
    await destination.attach()
    await destination.connect()
    assert await vmm.touch(0) == expected(0)
    source.may_answer.clear()
    before, _ = await vmm.start_touch(1)
    await destination.status_until(lambda status: status.progress.faults == 2)
    await source.stop()
    down = await destination.link_event(DOWN)
    assert down.link.reason
    after, _ = await vmm.start_touch(2)
    status = await destination.status_until(lambda status: status.progress.faults == 3)
    assert (status.link, status.link_reason) == (DOWN, down.link.reason)
    assert vmm.waits(before)
    assert vmm.waits(after)
    assert await vmm.touch(0) == expected(0), "pages that are here need no source"

    source.may_answer.set()
    await source.start()
    await destination.connect()
    assert (await destination.link_event(UP, after=down.number)).number > down.number
    assert [await vmm.touched(act) for act in (before, after)] == [expected(1), expected(2)]


async def test_a_broken_push_continues_with_the_missing_pages(destination: Destination) -> None:
    source = destination.source
    await destination.attach()
    await destination.connect()
    source.may_push.clear()
    await destination.push()
    act, _ = await destination.vmm.start_touch(40)
    assert await destination.vmm.touched(act) == expected(40)
    await source.stop()
    down = await destination.link_event(DOWN)
    assert not (await destination.status()).all_present

    source.may_push.set()
    await source.start()
    await destination.connect()
    await destination.push()
    await destination.event("all_present", after=down.number)
    assert await destination.complete() == 0
    assert [await destination.vmm.touch(page) for page in range(PAGES)] == [expected(page) for page in range(PAGES)]
    assert source.asked == [40]
    assert PUSH_PAGES < PAGES


async def test_a_silent_source_is_a_link_that_is_down(anonymous: Destination) -> None:
    await anonymous.attach()
    await anonymous.connect(demand_timeout_s=0.2)
    anonymous.source.may_answer.clear()
    act, _ = await anonymous.vmm.start_touch(1)
    down = await anonymous.link_event(DOWN)
    assert down.link.reason
    assert anonymous.vmm.waits(act)
    anonymous.source.may_answer.set()
    await anonymous.connect()
    assert await anonymous.vmm.touched(act) == expected(1)


async def test_a_silent_connection_is_replaced_by_a_new_one(destination: Destination) -> None:
    """As after an outage that a middle box did not survive: the source is there, and the connection carries nothing."""
    destination.source.deaf_lanes = 1
    await destination.attach()
    await destination.connect()
    await destination.push()
    assert await destination.vmm.touch(1) == expected(1)
    done = await destination.events_until(lambda event: event.WhichOneof("event") == "all_present")
    assert [event.link.state for event in done if event.WhichOneof("event") == "link"] == [UP, DONE]


async def test_a_link_on_which_answers_come_is_not_lost(anonymous: Destination) -> None:
    """However long the last of them takes."""
    await anonymous.attach()
    await anonymous.connect(demand_timeout_s=patient(2.0))
    anonymous.source.answer_after_s = patient(0.5)
    acts = [(await anonymous.vmm.start_touch(page))[0] for page in range(8)]
    assert [await anonymous.vmm.touched(act) for act in acts] == [expected(page) for page in range(8)]
    assert (await anonymous.status()).link == UP


async def test_a_push_that_fails_leaves_demand_alone(destination: Destination) -> None:
    """It is told, and tried again."""
    source = destination.source
    await destination.attach()
    await destination.connect()
    source.refuses_bulk = True
    await destination.push(lanes=8)
    failed = await destination.event("failed")
    assert "the source has no room" in failed.failed.reason
    assert await destination.vmm.touch(1) == expected(1)
    assert (await destination.status()).link == UP
    source.refuses_bulk = False
    await destination.event("all_present")


async def test_work_without_the_source_continues_while_the_link_is_down(destination: Destination) -> None:
    vmm = destination.vmm
    await destination.attach()
    await destination.connect()
    assert await vmm.touch(0) == expected(0)
    await destination.source.stop()
    await destination.link_event(DOWN)
    assert await destination.mark(5) == (1, 0, 0)
    assert await vmm.touch(5) == "sigbus"
    assert [frame["severity"] for frame in vmm.frames] == ["AO"]
    await vmm.give_back(0)
    assert await vmm.touch(0) == "byte:0"
