"""Prometheus figures of the RPCs: how many, how long, how they ended."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram

from fleet_server.domain.errors import FleetError
from fleet_server.rpc.methods import Method

_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class RpcMetrics:
    """`fleet_rpc_calls_total{method,code}` and `fleet_rpc_duration_seconds{method}`."""

    def __init__(self, registry: CollectorRegistry, methods: Iterable[Method]) -> None:
        self._calls = Counter(
            "fleet_rpc_calls", "Calls by method and gRPC code.", ["method", "code"], registry=registry
        )
        seconds = Histogram(
            "fleet_rpc_duration_seconds",
            "Time in the chain.",
            ["method"],
            buckets=_BUCKETS,
            registry=registry,
        )
        self._good = {method.path: self._calls.labels(method.path, "OK") for method in methods}
        self._seconds = {path: seconds.labels(path) for path in self._good}

    def observe(self, path: str, error: BaseException | None, seconds: float) -> None:
        """Counts one ended call."""
        self._seconds[path].observe(seconds)
        if error is None:
            self._good[path].inc()
            return
        code = "INTERNAL"
        if isinstance(error, FleetError):
            code = error.code.name
        elif isinstance(error, asyncio.CancelledError):
            code = "CANCELLED"
        self._calls.labels(path, code).inc()
