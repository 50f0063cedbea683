"""Prometheus figures of the RPCs: how many, how long, how they ended."""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from fleet_server.domain.errors import FleetError
from fleet_server.rpc.methods import Method

_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_BOUNDS = (*map(str, _BUCKETS), "+Inf")


class _Figures:
    """Of one method. `buckets` has one more than _BUCKETS: what was slower than all."""

    __slots__ = ("buckets", "good", "others", "seconds")

    def __init__(self) -> None:
        self.good = 0
        self.others: dict[str, int] = {}
        self.buckets = [0] * (len(_BUCKETS) + 1)
        self.seconds = 0.0


class RpcMetrics(Collector):
    """`fleet_rpc_calls_total{method,code}` and `fleet_rpc_duration_seconds{method}`, shown by `registry`.

    Every call is counted on the event loop's thread, so plain numbers do, and are made into Prometheus' objects when
    somebody looks.
    """

    def __init__(self, registry: CollectorRegistry, methods: Iterable[Method]) -> None:
        self._figures = {method.path: _Figures() for method in methods}
        registry.register(self)

    def observe(self, path: str, error: BaseException | None, seconds: float) -> None:
        """Counts one ended call."""
        figures = self._figures[path]
        figures.buckets[bisect_left(_BUCKETS, seconds)] += 1
        figures.seconds += seconds
        if error is None:
            figures.good += 1
            return
        code = "INTERNAL"
        if isinstance(error, FleetError):
            code = error.code.name
        elif isinstance(error, asyncio.CancelledError):
            code = "CANCELLED"
        figures.others[code] = figures.others.get(code, 0) + 1

    def collect(self) -> Iterator[Metric]:
        """The figures as Prometheus takes them; methods that were never called are there with zeros."""
        calls = CounterMetricFamily("fleet_rpc_calls", "Calls by method and gRPC code.", labels=["method", "code"])
        seconds = HistogramMetricFamily("fleet_rpc_duration_seconds", "Time in the chain.", labels=["method"])
        for path, figures in self._figures.items():
            for code, count in {"OK": figures.good, **figures.others}.items():
                calls.add_metric([path, code], count)
            total, buckets = 0, []
            for bound, count in zip(_BOUNDS, figures.buckets, strict=True):
                total += count
                buckets.append((bound, float(total)))
            seconds.add_metric([path], buckets, figures.seconds)
        yield calls
        yield seconds
