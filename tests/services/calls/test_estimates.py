"""When work should be done: what is known of lanes, places in line and progress, and null where nothing is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from fleet.v1 import types_pb2

from fleet_server.domain.job import Lane
from fleet_server.domain.node import NodeStatus, NodeView
from fleet_server.domain.speeds import NoTiming
from fleet_server.services.estimates import Estimates
from fleet_server.services.lanes import lane_of
from tests.services.calls.desk import Desk, now_ms


@dataclass
class Seconds(NoTiming):
    """Each node takes so long for a job, with the model in memory already."""

    by_node: dict[str, float] = field(default_factory=dict)

    def run_seconds(self, node: NodeView, lane: Lane) -> float | None:
        return self.by_node.get(node.node_id)


@dataclass
class Fleet:
    """Nodes that a test has made."""

    views: Sequence[NodeView]
    asked: int = 0

    def nodes(self) -> list[NodeView]:
        self.asked += 1
        return list(self.views)


async def lane_and_fleet(desk: Desk) -> tuple[Lane, Fleet]:
    """Two nodes with the model in memory, one of them with two slots, and a third that is away."""
    await desk.add_node("fast", loaded=["sketch"])
    await desk.add_node("wide", loaded=["sketch"], slots=2)
    await desk.add_node("away", loaded=["sketch"])
    desk.nodes.set_status("away", NodeStatus.DOWN)
    spec = types_pb2.JobSpec.FromString((await desk.record(await desk.submit())).spec)
    return lane_of(spec), Fleet(desk.nodes.nodes())


def estimates(fleet: Fleet, usual_ms: float | None = None, **seconds: float) -> Estimates:
    return Estimates(fleet, Seconds(by_node=seconds), lambda lane_id: usual_ms, clock=now_ms, fresh_ms=1000)


async def test_a_lane_goes_at_the_pace_of_all_who_can_run_it(desk: Desk) -> None:
    lane, fleet = await lane_and_fleet(desk)
    reckoned = estimates(fleet, fast=1.0, wide=2.0, away=0.001)
    # One a second and two in two seconds.
    assert reckoned.lane(lane, 10) == pytest.approx(5)
    assert reckoned.lane(lane, 0) is None
    assert reckoned.queue([(lane, 5.0)]) == 5
    assert reckoned.queue([(lane, 5.0), (lane, 2.0)]) == 7
    assert reckoned.queue([(lane, 5.0), (lane, None)]) is None


async def test_where_no_speed_is_known_the_lanes_own_runs_serve(desk: Desk) -> None:
    lane, fleet = await lane_and_fleet(desk)
    assert estimates(fleet, usual_ms=3000).lane(lane, 2) == pytest.approx(2 * 3 / 3)
    assert estimates(fleet).lane(lane, 2) is None
    assert estimates(Fleet(())).lane(lane, 2) is None


async def test_a_place_in_line_is_what_is_before_it_and_the_soonest_run(desk: Desk) -> None:
    lane, fleet = await lane_and_fleet(desk)
    reckoned = estimates(fleet, fast=1.0, wide=2.0)
    assert reckoned.queued(lane, 1) == pytest.approx(1)
    assert reckoned.queued(lane, 5) == pytest.approx(4 / 2 + 1)
    assert estimates(fleet).queued(lane, 1) is None


async def test_many_questions_look_at_the_fleet_once(desk: Desk) -> None:
    lane, fleet = await lane_and_fleet(desk)
    reckoned = Estimates(fleet, Seconds(by_node={"fast": 1.0}), lambda _: None, clock=lambda: 0, fresh_ms=1000)
    for position in range(1, 100):
        reckoned.queued(lane, position)
    assert fleet.asked == 1


async def test_a_running_job_ends_as_its_progress_says(desk: Desk) -> None:
    lane, fleet = await lane_and_fleet(desk)
    job_id = await desk.submit()
    claim = await desk.start("fast")
    record = await desk.record(claim.job.job_id)
    started = record.started_ms
    assert started is not None
    reckoned = Estimates(fleet, Seconds(by_node={"fast": 30.0}), lambda _: None, clock=lambda: started + 10_000)
    tick = types_pb2.JobProgress(job_id=job_id, progress=25)
    assert reckoned.running(record, tick, lane) == pytest.approx(30)
    # Before it has got anywhere, what such jobs take there; never less than nothing.
    assert reckoned.running(record, None, lane) == pytest.approx(20)
    late = Estimates(fleet, Seconds(by_node={"fast": 3.0}), lambda _: None, clock=lambda: started + 10_000)
    assert late.running(record, None, lane) == 0
    assert Estimates(fleet, NoTiming(), lambda _: None, clock=now_ms).running(record, None, lane) is None


async def test_jobs_and_stats_show_them(desk: Desk) -> None:
    await desk.add_node()
    job_id = await desk.submit()
    assert not (await desk.queue.get(job_id)).HasField("eta_seconds")
    await desk.start()
    desk.ticks.publish(types_pb2.JobProgress(job_id=job_id, progress=50, generation=1, attempt=1))
    assert (await desk.queue.get(job_id)).HasField("eta_seconds")
