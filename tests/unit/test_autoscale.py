"""Autoscale: up at once, down when it has been calm, never under running work, never past its bounds."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet_server.domain.autoscale import AutoscaleRule, Calm, Depth, decide, depth_of
from fleet_server.domain.job import Lane

RULE = AutoscaleRule(min_replicas=1, max_replicas=4, jobs_per_replica=5)
CALM = 60.0


class Service:
    """One service under a rule, second by second."""

    def __init__(self, rule: AutoscaleRule = RULE, replicas: int = 1) -> None:
        self.rule = rule
        self.replicas = replicas
        self.calm = Calm()

    def at(self, now: float, waiting: int, running: int = 0) -> int:
        depth = Depth(waiting, running)
        self.replicas, self.calm = decide(self.rule, self.replicas, depth, self.calm, now=now, calm_seconds=CALM)
        return self.replicas


def lane(cluster: str = "vision", job_type: str = "image_gen", model: str = "") -> Lane:
    return Lane(lane_id="x", cluster=cluster, job_type=job_type, model=model)


@pytest.mark.parametrize(("waiting", "replicas"), [(0, 1), (1, 1), (5, 1), (6, 2), (15, 3), (16, 4), (1_000_000, 4)])
def test_waiting_jobs_make_replicas_at_once(waiting: int, replicas: int) -> None:
    assert Service().at(0, waiting) == replicas


def test_fewer_only_after_calm() -> None:
    service = Service()
    assert service.at(0, 20) == 4
    assert service.at(1, 0) == 4
    assert service.at(59, 0) == 4
    assert service.at(61, 0) == 1


def test_calm_begins_again_with_each_burst() -> None:
    service = Service()
    for now in range(0, 300, 30):
        # A burst each half minute: its replicas are there for the next one.
        assert service.at(now, 20) == 4
        assert service.at(now + 10, 0) == 4


def test_what_the_calm_time_needed_at_its_busiest_stays() -> None:
    service = Service()
    assert service.at(0, 20) == 4
    assert [service.at(now, 10) for now in (10, 40)] == [4, 4]
    # What was wanted at 0 was so until 10.
    assert [service.at(now, 0) for now in (65, 70)] == [4, 2]
    assert [service.at(now, 0) for now in (124, 125)] == [2, 1]


def test_nothing_is_taken_before_a_whole_calm_time_was_seen() -> None:
    # A server that has just come knows nothing of the past.
    service = Service(replicas=4)
    assert service.at(1_000, 0) == 4
    assert service.at(1_059, 0) == 4
    assert service.at(1_060, 0) == 1


def test_running_jobs_keep_their_replicas() -> None:
    service = Service()
    service.at(0, 20)
    assert [service.at(now, 0, running=3) for now in (30, 100, 200)] == [4, 3, 3]
    assert [service.at(now, 0) for now in (300, 360)] == [3, 1]


def test_running_jobs_of_others_make_no_replicas() -> None:
    assert Service().at(0, 0, running=50) == 1


def test_none_of_zero() -> None:
    service = Service(replace(RULE, min_replicas=0))
    assert [service.at(0, 1), service.at(1, 0), service.at(70, 0)] == [1, 1, 0]


def test_new_bounds_hold_at_once() -> None:
    service = Service(replicas=9)
    assert service.at(0, 100) == 4
    assert Service(replace(RULE, min_replicas=3), replicas=0).at(0, 0) == 3


def test_off_keeps_what_is() -> None:
    service = Service(replace(RULE, enabled=False), replicas=7)
    assert [service.at(0, 100), service.at(100, 0)] == [7, 7]


def test_which_jobs_count() -> None:
    lanes = [
        (lane(model="sdxl"), 3, 1),
        (lane(model="flux"), 10, 2),
        (lane(cluster="nlp", job_type="llm", model="sdxl"), 100, 7),
        (lane(job_type="", model=""), 1_000, 0),
    ]
    assert depth_of(RULE, lanes) == Depth(1_113, 10)
    assert depth_of(replace(RULE, cluster="vision"), lanes) == Depth(1_013, 3)
    assert depth_of(replace(RULE, job_type="image_gen"), lanes) == Depth(13, 3)
    assert depth_of(replace(RULE, cluster="vision", model="sdxl"), lanes) == Depth(3, 1)


@given(st.lists(st.tuples(st.floats(0, 30), st.integers(0, 60), st.integers(0, 6)), min_size=1, max_size=60))
def test_always_within_bounds_and_enough(steps: list[tuple[float, int, int]]) -> None:
    service, now = Service(), 0.0
    for pause, waiting, running in steps:
        now += pause
        before = service.replicas
        after = service.at(now, waiting, running)
        assert RULE.min_replicas <= after <= RULE.max_replicas
        assert after >= min(RULE.max_replicas, -(-waiting // RULE.jobs_per_replica))
        assert after >= min(before, running)
        assert len(service.calm.wanted) <= len(steps)
