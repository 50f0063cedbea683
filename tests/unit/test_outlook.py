"""What is believed of the lanes between two looks, and when the store has to be asked."""

from __future__ import annotations

from dataclasses import replace

from fleet_server.domain.job import Lane, NewJob, Priority
from fleet_server.services.outlook import Outlook
from fleet_server.store import LaneView

HOUR = 3_600_000


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def outlook(clock: Clock | None = None) -> Outlook:
    return Outlook(1.0, clock=clock or Clock())


def lane(name: str) -> Lane:
    return Lane(lane_id=name, cluster="vision", job_type="image_gen")


def view(name: str, waiting: int = 2, priority: Priority = Priority.NORMAL) -> LaneView:
    return LaneView(lane(name), waiting, 0, priority, 5, 5, high_waiting=priority is Priority.HIGH)


def job(name: str, priority: Priority = Priority.NORMAL) -> NewJob:
    return NewJob(f"job-{name}", b"", lane(name), priority, "", 3, 60_000, 60_000)


def test_nothing_is_believed_before_the_first_look() -> None:
    known = outlook()
    known.expect(job("a"), HOUR)
    assert known.take() is None
    # What was announced before a look is in it.
    known.looked([view("a", 1)])
    belief = known.take()
    assert belief is not None
    assert [one.waiting for one in belief.lanes] == [1]


def test_what_was_just_seen_is_sure_once() -> None:
    known = outlook()
    known.looked([view("a")])
    first, second = known.take(), known.take()
    assert first is not None
    assert second is not None
    assert (first.sure, second.sure) == (True, False)
    assert first.lanes == second.lanes == (view("a"),)


def test_what_happened_since_makes_it_less_than_sure() -> None:
    known = outlook()
    known.looked([view("a")])
    known.aged()
    belief = known.take()
    assert belief is not None
    assert not belief.sure


def test_a_doubt_and_a_while_end_it() -> None:
    clock = Clock()
    known = outlook(clock)
    known.looked([view("a")])
    known.doubt()
    assert known.take() is None
    known.looked([view("a")])
    clock.now += 0.99
    assert known.take() is not None
    clock.now += 0.01
    assert known.take() is None


def test_an_empty_queue_is_asked_again() -> None:
    known = outlook()
    known.looked([])
    assert known.take() is None


def test_a_job_in_an_empty_queue_is_its_only_lane() -> None:
    known = outlook()
    known.looked([])
    known.expect(job("a", Priority.HIGH), HOUR)
    belief = known.take()
    assert belief is not None
    assert not belief.sure
    (one,) = belief.lanes
    assert (one.lane, one.waiting, one.head_priority, one.high_waiting) == (lane("a"), 1, Priority.HIGH, True)
    assert (one.head_effective_ms, one.oldest_enqueued_ms) == (HOUR - 600_000, HOUR)


def test_jobs_of_a_lane_that_waits_are_counted() -> None:
    known = outlook()
    known.looked([view("a"), view("b")])
    for _ in range(3):
        known.expect(job("b"), HOUR)
    belief = known.take()
    assert belief is not None
    assert not belief.sure
    assert list(belief.lanes) == [view("a"), replace(view("b"), waiting=5)]


def test_whose_turn_it_is_only_the_store_says() -> None:
    known = outlook()
    known.looked([view("a")])
    known.expect(job("b"), HOUR)
    assert known.take() is None
    known.looked([view("a")])
    known.expect(job("a", Priority.HIGH), HOUR)
    assert known.take() is None
    # Where a high one waits already, another changes nothing.
    known.looked([view("a", priority=Priority.HIGH)])
    known.expect(job("a", Priority.HIGH), HOUR)
    assert known.take() is not None
    known.looked([])
    known.expect(job("a"), HOUR)
    known.expect(job("b"), HOUR)
    assert known.take() is None
