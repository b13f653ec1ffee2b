"""The agreements of both ends of `peer.proto` besides its messages: version, sizes, keepalive."""

from __future__ import annotations

from vmferry.model.vmm import DEVICE_STATE_LIMIT
from vmferry.units import MIB

PROTOCOL_VERSION = 5
"""The version of peer.proto."""

MESSAGE_LIMIT = DEVICE_STATE_LIMIT + 16 * MIB
"""A `Ready` carries the device state and the ledger (about 40 bytes an error). A `Prepare` carries at most 65536 ranges
of pages, below 2 MiB."""

ANSWER_S = 10.0
"""The longest silence of a peer before it counts as gone, seconds: the default of `timeouts.peer_s`."""

LEAST_BYTES_PER_S = MIB
"""A slower network counts as broken. Deadlines of large calls grow by the time at this rate."""

_SIZES = (
    ("grpc.max_send_message_length", MESSAGE_LIMIT),
    ("grpc.max_receive_message_length", MESSAGE_LIMIT),
)


def transfer_s(size: int) -> float:
    """Seconds that a deadline adds for a message of `size` bytes."""
    return size / LEAST_BYTES_PER_S


def _keepalive(answer_s: float) -> tuple[tuple[str, int], ...]:
    """Keepalive options. A peer that dies without closing its connection is noticed after `answer_s`.

    Half of the time passes before the ping, half after it; gRPC sets TCP_USER_TIMEOUT to the second half.
    """
    half_ms = max(1_000, int(answer_s * 500))
    return ("grpc.keepalive_time_ms", half_ms), ("grpc.keepalive_timeout_ms", half_ms)


def channel_options(answer_s: float = ANSWER_S) -> tuple[tuple[str, int], ...]:
    """The options of a client with `answer_s` as its shortest deadline."""
    return (
        *_SIZES,
        *_keepalive(answer_s),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        # The deadline of one attempt to connect, two round trips, whatever gRPC calls it. It ends before the call's own
        # deadline, which names no cause.
        ("grpc.min_reconnect_backoff_ms", int(answer_s * 800)),
        # Hosts of one fleet talk to each other directly, at any proxy setting of the environment.
        ("grpc.enable_http_proxy", 0),
        # One connection per client: it is not shared with other clients of this process for the same address.
        ("grpc.use_local_subchannel_pool", 1),
    )


def server_options(answer_s: float = ANSWER_S) -> tuple[tuple[str, int], ...]:
    """The options of the `grpc.aio.server` that carries `PeerServicer`."""
    return (
        *_SIZES,
        *_keepalive(answer_s),
        # The client's pings are wanted: without this the server answers them with GOAWAY "too_many_pings". The two
        # daemons may be configured differently.
        ("grpc.http2.min_ping_interval_without_data_ms", 500),
        ("grpc.http2.max_ping_strikes", 0),
        # A second daemon on the same address must fail to start, not share the port.
        ("grpc.so_reuseport", 0),
    )
