"""`pager.proto`'s own messages ⇄ the model. `rpc/convert.py` has the shared messages."""

from __future__ import annotations

from vmferry.model.pager import (
    AllPresent,
    LinkChanged,
    MemoryAttached,
    MemoryDetached,
    MemoryErrorFound,
    PagerEvent,
    PagerEventBody,
    PagerFailedEvent,
    PagerStatus,
    PagesReplaced,
)
from vmferry.rpc import convert as wire
from vmferry.v1 import pager_pb2 as pb


def status_from_pb(message: pb.PagerStatus) -> PagerStatus:
    return PagerStatus(
        pid=message.pid,
        memory_attached=message.memory_attached,
        memory_reason=message.memory_reason,
        link_up=message.link == pb.LINK_STATE_UP,
        link_reason=message.link_reason,
        all_present=message.all_present,
        progress=wire.progress_from_pb(message.progress),
    )


def event_from_pb(message: pb.PagerEvent) -> PagerEvent | None:
    """Converts an event. None: this version does not know it, or it is the link state DONE: AllPresent follows."""
    body = _body_from_pb(message)
    return None if body is None else PagerEvent(message.number, message.at_us, body)


def _body_from_pb(message: pb.PagerEvent) -> PagerEventBody | None:  # noqa: PLR0911 a case an event
    match message.WhichOneof("event"):
        case "memory_error":
            found = message.memory_error
            error = wire.error_from_pb(found.error, "memory_error.error")
            return MemoryErrorFound(error, found.hva, found.thread_id, found.reported)
        case "link" if message.link.state in {pb.LINK_STATE_UP, pb.LINK_STATE_DOWN}:
            return LinkChanged(message.link.state == pb.LINK_STATE_UP, message.link.reason)
        case "pages_replaced":
            return PagesReplaced(tuple((page.gpa, page.lsb) for page in message.pages_replaced.pages))
        case "all_present":
            return AllPresent()
        case "memory_attached":
            return MemoryAttached(message.memory_attached.vmm_pid)
        case "memory_detached":
            return MemoryDetached(message.memory_detached.reason)
        case "failed":
            return PagerFailedEvent(message.failed.reason)
        case _:
            return None
