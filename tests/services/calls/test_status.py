"""Health, status, capabilities and the queue's figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fleet.v1 import fleet_pb2, queue_pb2, types_pb2

from fleet_server.domain.errors import FleetError
from fleet_server.domain.job import JobRecord, JobState, Priority, WaitReason
from fleet_server.domain.node import NodeStatus
from fleet_server.services.rates import Rates
from fleet_server.services.status import StatusBoard, StatusSettings
from fleet_server.store import Store, open_store
from tests.services.calls.desk import ALIAS, STATUS, Desk, desk_on, now_ms
from tests.waiting import wait_until

START = 1_763_805_600_000


async def test_status_counts_and_tells_what_a_person_should_know(desk: Desk) -> None:
    status = await desk.board.status()
    assert (status.status, status.durability, status.store.status, status.s3.status) == (
        "degraded",
        "fsync",
        "ok",
        "off",
    )
    assert any("no node is online" in notice for notice in status.notices)
    await desk.add_node()
    await desk.add_node("agx1")
    desk.nodes.set_status("agx1", NodeStatus.DISCONNECTED)
    await desk.submit()
    await desk.run_next()
    await desk.submit()
    status = await desk.board.status()
    assert (status.status, status.version, status.mode) == ("ok", "1.0.0", "embedded")
    assert (status.nodes.total, status.nodes.online, status.nodes.disconnected, status.nodes.down) == (2, 1, 1, 0)
    assert (status.jobs.queued, status.jobs.succeeded, status.jobs.failed) == (1, 1, 0)
    assert list(status.notices) == [f"{ALIAS} is an alias of sketch, which is no diffusion model"]
    assert not status.store.HasField("detail")


async def test_without_the_store_health_fails_and_status_still_answers(desk: Desk, tmp_path: Path) -> None:
    await desk.board.check_health()
    async with open_store(f"unix://{tmp_path}/nobody") as away:
        settings = StatusSettings("1.0.0", store_seconds=0.2)
        board = StatusBoard(away, desk.nodes, desk.catalog, desk.rates, settings, desk.estimates, clock=now_ms)
        with pytest.raises(FleetError) as caught:
            await board.check_health()
        assert caught.value.reason == "STORE_UNAVAILABLE" and caught.value.retry_after_seconds
        status = await board.status()
        assert (status.status, status.store.status) == ("unavailable", "unavailable") and status.store.detail


async def test_a_server_that_refuses_work_is_not_healthy(desk: Desk) -> None:
    refusal = FleetError("DISK_FULL", "the disk is full")
    board = StatusBoard(
        desk.store, desk.nodes, desk.catalog, desk.rates, STATUS, desk.estimates, clock=now_ms,
        refusal=lambda: refusal,
    )  # fmt: skip
    with pytest.raises(FleetError) as caught:
        await board.check_health()
    assert caught.value is refusal
    status = await board.status()
    assert status.status == "unavailable" and "the disk is full" in status.notices


async def test_capabilities_list_every_type_and_who_runs_it(desk: Desk) -> None:
    await desk.add_node()
    reply = desk.board.capabilities()
    assert list(reply.capabilities) == ["nodes", "containers", "images", "generation", "ssh", "metrics", "vision"]
    counts = {row.job_type: row.online_nodes for row in reply.job_types}
    assert counts == {number: int(number == 1) for number in range(1, 7)}
    assert (list(reply.clusters), list(reply.engines), reply.default_model) == (["vision"], ["sketch"], ALIAS)
    assert reply.limits == fleet_pb2.Limits(
        body_bytes=1_048_576, batch_jobs=1000, queued_jobs=1_000_000, input_bytes=536_870_912
    )
    assert list(reply.priorities) == [1, 2, 3]


async def test_stats_count_jobs_lanes_and_the_last_hour(desk: Desk) -> None:
    stats = await desk.board.queue_stats()
    assert not stats.HasField("submitted_per_second") and not stats.wait_seconds.HasField("p50")
    assert stats.HasField("wait_seconds") and not stats.HasField("eta_seconds") and not stats.lanes
    await desk.add_node()
    await desk.submit(priority="high")
    await desk.run_next()
    for priority in ("high", "normal", "low", "normal"):
        await desk.submit(priority=priority)
    await desk.start()
    await wait_until(lambda: desk.rates.run_ms(_lane_id(desk)) is not None)
    stats = await desk.board.queue_stats()
    assert (stats.jobs.queued, stats.jobs.running, stats.jobs.succeeded) == (3, 1, 1)
    waiting = stats.queued_by_priority
    assert (waiting.high, waiting.normal, waiting.low) == (0, 2, 1)
    (lane,) = stats.lanes
    assert (lane.target_cluster, lane.job_type, lane.target_model) == ("vision", types_pb2.JOB_TYPE_IMAGE_GEN, "sketch")
    assert (lane.queued, lane.running, lane.paused) == (3, 1, False)
    assert lane.HasField("oldest_queued_seconds") and lane.HasField("eta_seconds")
    assert stats.eta_seconds == lane.eta_seconds and stats.window_seconds == 3600
    assert stats.submitted_per_second > 0 and stats.ended_per_second > 0 and stats.run_seconds.HasField("p99")


def _lane_id(desk: Desk) -> str:
    return next(iter(desk.rates.lanes()), "")


async def test_the_last_hour_outlives_a_restart(store: Store, tmp_path: Path) -> None:
    async with desk_on(store, tmp_path) as desk:
        await desk.add_node()
        for _ in range(3):
            await desk.submit()
            await desk.run_next()
        await wait_until(lambda: figures(desk.rates).ended_per_second == pytest.approx(3 / 3600))
        before = figures(desk.rates)
    async with desk_on(store, tmp_path) as desk:
        await wait_until(lambda: figures(desk.rates) == before)


def figures(rates: Rates) -> queue_pb2.GetStatsResponse:
    stats = queue_pb2.GetStatsResponse()
    rates.fill(stats)
    return stats


def ended(at_ms: int, wait_ms: int, run_ms: int, **more: Any) -> JobRecord:
    values: dict[str, Any] = {
        "job_id": "j", "state": JobState.SUCCEEDED, "wait_reason": WaitReason.NONE, "job_type": "image_gen",
        "priority": Priority.NORMAL, "cluster": "vision", "lane_id": "l", "model": "", "owner": "", "generation": 1,
        "version": 4, "attempt": 1, "losses": 0, "max_retries": 3, "timeout_ms": 1, "queue_ttl_ms": 1,
        "created_ms": at_ms, "enqueued_ms": at_ms - wait_ms - run_ms, "updated_ms": at_ms,
        "started_ms": at_ms - run_ms, "ended_ms": at_ms,
    }  # fmt: skip
    return JobRecord(**{**values, **more})


def test_percentiles_are_right_within_five_percent_and_forget_after_the_hour() -> None:
    now = START
    rates = Rates(lambda: now)
    for ms in range(10, 1010, 10):
        rates.note(ended(now, 0, ms))
        rates.note(ended(now, 2 * ms, 5, state=JobState.RUNNING))
    stats = figures(rates)
    assert stats.run_seconds.p50 == pytest.approx(0.5, rel=0.05)
    assert stats.run_seconds.p95 == pytest.approx(0.95, rel=0.05)
    assert stats.wait_seconds.p99 == pytest.approx(1.98, rel=0.05)
    assert stats.ended_per_second == pytest.approx(100 / 3600)
    assert rates.run_ms("l") == pytest.approx(sum(range(690, 1010, 10)) / 32)
    now += 3_700_000
    assert not figures(rates).HasField("ended_per_second")
