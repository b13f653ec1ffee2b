"""The table of statuses is complete, and an error survives the wire."""

from __future__ import annotations

import grpc
from google.rpc import error_details_pb2
from hypothesis import given
from hypothesis import strategies as st

from vmferry.errors import Reason, VmferryError
from vmferry.rpc.status import CODE_OF, DETAILS_KEY, error_of, rich_status


def rpc_error(trailing: dict[str, bytes], details: str = "said") -> grpc.aio.AioRpcError:
    metadata = grpc.aio.Metadata(*trailing.items())
    return grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, grpc.aio.Metadata(), metadata, details)


def test_every_reason_has_one_code_and_none_is_ok() -> None:
    assert set(CODE_OF) == set(Reason)
    assert grpc.StatusCode.OK not in CODE_OF.values()


def test_reason_and_remedy_are_in_error_info() -> None:
    status = rich_status(VmferryError(Reason.VM_UNKNOWN, "No VM a.", "List them."))
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (status.code, status.message) == (grpc.StatusCode.NOT_FOUND.value[0], "No VM a.")
    assert (info.reason, info.domain, info.metadata["remedy"]) == ("VM_UNKNOWN", "vmferry", "List them.")


@given(st.sampled_from(Reason), st.text(max_size=200), st.text(max_size=200))
def test_error_there_and_back(reason: Reason, message: str, remedy: str) -> None:
    status = rich_status(VmferryError(reason, message, remedy))
    back = error_of(rpc_error({DETAILS_KEY: status.SerializeToString()}, status.message))
    assert back is not None
    assert (back.reason, back.message, back.remedy) == (reason, message, remedy)


def test_long_text_fits_the_metadata_limit() -> None:
    status = rich_status(VmferryError(Reason.INTERNAL, "€" * 100_000, "€" * 100_000))
    assert len(status.SerializeToString()) * 4 // 3 + len(status.message.encode()) * 3 < 8192


@given(st.binary())
def test_damaged_details_are_no_error_of_ours(data: bytes) -> None:
    assert error_of(rpc_error({DETAILS_KEY: data})) is None


def test_other_domains_are_not_ours_and_new_reasons_keep_their_name() -> None:
    status = rich_status(VmferryError(Reason.VM_UNKNOWN, "m"))
    info = error_details_pb2.ErrorInfo(reason="VM_UNKNOWN", domain="example.com")
    status.details[0].Pack(info)
    assert error_of(rpc_error({DETAILS_KEY: status.SerializeToString()})) is None
    status.details[0].Pack(error_details_pb2.ErrorInfo(reason="FROM_THE_FUTURE", domain="vmferry"))
    newer = error_of(rpc_error({DETAILS_KEY: status.SerializeToString()}))
    assert newer is not None
    assert newer.reason is Reason.INTERNAL
    assert "FROM_THE_FUTURE" in newer.message
