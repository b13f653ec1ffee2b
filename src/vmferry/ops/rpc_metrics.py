"""Counts and durations of the calls that the daemon's gRPC servers answer. It imports no grpc: `rpc/` reports calls."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

BOUNDS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 60.0)


class RpcMetrics:
    """The calls of one daemon. `observe` is for the servers' interceptor."""

    def __init__(self) -> None:
        self._handled = Counter("vmferry_rpcs", "gRPC calls answered.", ["service", "method", "code"], registry=None)
        self._seconds = Histogram(
            "vmferry_rpc_seconds",
            "Duration of unary gRPC calls.",
            ["service", "method"],
            buckets=BOUNDS_S,
            registry=None,
        )

    def register(self, registry: CollectorRegistry) -> None:
        registry.register(self._handled)
        registry.register(self._seconds)

    def observe(self, full_name: str, code: str, seconds: float | None) -> None:
        """One call: `full_name` is "/package.Service/Method". None: a stream, whose duration is its reader's."""
        service, _, method = full_name.strip("/").partition("/")
        service = service.rpartition(".")[2]
        self._handled.labels(service, method, code).inc()
        if seconds is not None:
            self._seconds.labels(service, method).observe(seconds)
