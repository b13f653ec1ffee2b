"""What both ends of `peer.proto` must agree on beyond the messages: version, sizes, keepalive."""

from __future__ import annotations

from vmferry.units import MIB

PROTOCOL_VERSION = 3
"""Of peer.proto."""

DEVICE_STATE_LIMIT = 64 * MIB
MESSAGE_LIMIT = DEVICE_STATE_LIMIT + 16 * MIB
"""A `Ready` carries the device state and the ledger (about 40 bytes an error). A `Prepare` carries at most 65536 ranges
of pages, below 2 MiB."""

KEEPALIVE_TIME_MS = 5_000
KEEPALIVE_TIMEOUT_MS = 5_000
"""A peer that is gone without closing its connection is noticed after the sum of both."""

_SIZES = (
    ("grpc.max_send_message_length", MESSAGE_LIMIT),
    ("grpc.max_receive_message_length", MESSAGE_LIMIT),
)

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    *_SIZES,
    ("grpc.keepalive_time_ms", KEEPALIVE_TIME_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # Hosts of one fleet talk to each other directly, whatever the environment says.
    ("grpc.enable_http_proxy", 0),
    # One connection a client: not shared with others of this process that name the same address.
    ("grpc.use_local_subchannel_pool", 1),
)

SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    *_SIZES,
    ("grpc.keepalive_time_ms", KEEPALIVE_TIME_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    # The client's pings are wanted: without this the server answers them with GOAWAY "too_many_pings".
    ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_TIME_MS // 2),
    ("grpc.http2.max_ping_strikes", 0),
    # A second daemon on the same address must fail to start, not share the port.
    ("grpc.so_reuseport", 0),
)
"""For the `grpc.aio.server` that carries `PeerServicer`."""
