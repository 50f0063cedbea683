"""When a broken stream is tried again, and from where. Pure: the clock is the test's."""

from __future__ import annotations

import pytest
from fleet_client import ApiError, ConnectionFailedError, WaitTimeoutError
from fleet_client.events import Resume

BROKEN = ConnectionFailedError("broken")


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_stream_that_never_came_up_is_not_tried_again() -> None:
    with pytest.raises(ConnectionFailedError):
        Resume(60).pause(BROKEN)


def test_pauses_grow_and_end_with_the_patience() -> None:
    clock = Clock()
    resume = Resume(60, clock=clock)
    resume.opened()
    pauses = []
    with pytest.raises(ConnectionFailedError):
        while True:
            pauses.append(resume.pause(BROKEN))
            clock.now += pauses[-1]
    assert 0.075 <= pauses[0] <= 0.125
    assert all(3.75 <= pause <= 6.25 for pause in pauses[7:])
    assert 60 <= clock.now - 100 <= 67


def test_an_event_renews_the_patience() -> None:
    clock = Clock()
    resume = Resume(10, clock=clock)
    resume.opened()
    for _ in range(5):
        resume.pause(BROKEN)
        clock.now += 9
        resume.saw({"id": None})
    resume.pause(BROKEN)
    clock.now += 10
    with pytest.raises(ConnectionFailedError):
        resume.pause(BROKEN)


def test_a_flapping_stream_is_tried_more_slowly_and_a_steady_one_at_once() -> None:
    clock = Clock()
    resume = Resume(60, clock=clock)
    for _ in range(8):
        resume.opened()
        resume.saw({"id": None})
        slow = resume.pause(BROKEN)
    assert slow > 3
    resume.opened()
    clock.now += 6
    resume.saw({"id": None})
    assert resume.pause(BROKEN) < 0.2


@pytest.mark.parametrize("status", [400, 401, 404, 500])
def test_a_refusal_is_raised(status: int) -> None:
    resume = Resume(60)
    resume.opened()
    with pytest.raises(ApiError):
        resume.pause(ApiError(status, {"detail": "no"}))


def test_a_server_that_stops_is_tried_again() -> None:
    resume = Resume(60)
    resume.opened()
    assert resume.pause(ApiError(503, {"detail": "shutting down"})) > 0


def test_the_next_try_names_the_last_event_with_an_id() -> None:
    resume = Resume(60)
    assert "Last-Event-ID" not in resume.headers()
    resume.saw({"id": "5-0"})
    resume.saw({"id": None})
    assert resume.headers()["Last-Event-ID"] == "5-0"


def test_only_a_live_stream_without_an_id_loses_events() -> None:
    assert not Resume(60).lost_events
    live = Resume(60, live=True)
    assert live.lost_events
    live.saw({"id": "1-0"})
    assert not live.lost_events


def test_the_deadline_is_the_servers_to_hold_and_ours_to_end_with() -> None:
    clock = Clock()
    resume = Resume(60, 5, clock=clock)
    assert resume.headers()["Grpc-Timeout"] == "5001m"
    clock.now += 4
    assert resume.headers()["Grpc-Timeout"] == "1001m"
    with pytest.raises(WaitTimeoutError, match="within 5 s"):
        resume.pause(ApiError(504, {"detail": "too late"}))
    clock.now += 1
    with pytest.raises(WaitTimeoutError):
        resume.headers()


def test_a_long_deadline_fits_the_header() -> None:
    assert Resume(60, 1e9).headers()["Grpc-Timeout"] == "99999999m"
