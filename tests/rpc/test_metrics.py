"""What Prometheus sees of the calls."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from fleet_server.domain.errors import FleetError
from fleet_server.rpc.metrics import RpcMetrics

PATH = "/fleet.v1.Queue/GetJob"
OTHER = "/fleet.v1.Queue/ListJobs"


def metrics() -> tuple[CollectorRegistry, RpcMetrics]:
    registry = CollectorRegistry()
    methods: Any = [SimpleNamespace(path=PATH), SimpleNamespace(path=OTHER)]
    return registry, RpcMetrics(registry, methods)


def test_calls_are_counted_by_how_they_ended() -> None:
    registry, seen = metrics()
    not_found = FleetError("JOB_NOT_FOUND", "no such job")
    for error in (None, None, not_found, asyncio.CancelledError(), KeyError("x")):
        seen.observe(PATH, error, 0.1)
    for code, count in (("OK", 2), ("NOT_FOUND", 1), ("CANCELLED", 1), ("INTERNAL", 1)):
        assert registry.get_sample_value("fleet_rpc_calls_total", {"method": PATH, "code": code}) == count
    assert registry.get_sample_value("fleet_rpc_calls_total", {"method": OTHER, "code": "OK"}) == 0


def test_times_fall_into_buckets_that_add_up() -> None:
    registry, seen = metrics()
    for seconds in (0.0005, 0.001, 0.0011, 0.3, 1000.0):
        seen.observe(PATH, None, seconds)

    def below(bound: str) -> float | None:
        return registry.get_sample_value("fleet_rpc_duration_seconds_bucket", {"method": PATH, "le": bound})

    assert [below(bound) for bound in ("0.001", "0.0025", "0.25", "0.5", "300.0", "+Inf")] == [2, 3, 3, 4, 4, 5]
    assert registry.get_sample_value("fleet_rpc_duration_seconds_count", {"method": PATH}) == 5
    assert registry.get_sample_value("fleet_rpc_duration_seconds_sum", {"method": PATH}) == pytest.approx(1000.3026)


def test_the_text_is_what_prometheus_reads() -> None:
    registry, seen = metrics()
    seen.observe(PATH, None, 0.02)
    families = {family.name: family for family in text_string_to_metric_families(generate_latest(registry).decode())}
    assert {name: family.type for name, family in families.items()} == {
        "fleet_rpc_calls": "counter",
        "fleet_rpc_duration_seconds": "histogram",
    }
