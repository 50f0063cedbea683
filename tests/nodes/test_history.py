"""The last hour of readings in bounded memory."""

from __future__ import annotations

from fleet.v1.types_pb2 import Gpu, Heartbeat, Host

from fleet_server.services.history import CHUNK, HOUR_MS, History

NOW = 1_800_000_000_000


def beat(at_ms: int, percent: float = 1.0, *, name: str = "GPU") -> Heartbeat:
    made = Heartbeat(node_id="agx0", host=Host(cpu_percent=percent), gpus=[Gpu(name=name, utilization_percent=percent)])
    made.heartbeat_time.FromMilliseconds(at_ms)
    return made


def times(history: History, step_seconds: int = 5) -> list[int]:
    return [one.heartbeat_time.ToMilliseconds() for one in history.of("agx0", now_ms=NOW, step_seconds=step_seconds)]


def test_an_hour_is_kept_whole_and_nothing_older() -> None:
    history = History()
    start = NOW - 2 * HOUR_MS
    for at in range(start, NOW + 1, 5_000):
        history.keep(beat(at))
    found = times(history)
    assert found == list(range(NOW - HOUR_MS + 5_000, NOW + 1, 5_000))
    assert len(times(history, 15)) in {240, 241}


def test_a_step_gives_its_last_beat() -> None:
    history = History()
    for number in range(12):
        history.keep(beat(NOW - 60_000 + number * 5_000, number))
    found = history.of("agx0", now_ms=NOW, step_seconds=30)
    assert [one.host.cpu_percent for one in found] == [5, 11]


def test_the_same_beat_twice_and_one_that_is_late_count_once() -> None:
    history = History()
    for at in (NOW - 10_000, NOW - 10_000, NOW - 15_000, NOW):
        history.keep(beat(at))
    assert times(history) == [NOW - 10_000, NOW]


def test_memory_is_bounded_by_bytes_and_by_beats() -> None:
    small = History(most_bytes=2_000)
    for number in range(20 * CHUNK):
        small.keep(beat(NOW - 30_000 + number, name=f"{number * 7919:x}" * 20))
    kept = small._nodes["agx0"]
    assert kept.size <= 2_000
    assert kept.size == sum(len(chunk) for _, chunk in kept.packed)
    few = History(most_beats=2 * CHUNK)
    for number in range(20 * CHUNK):
        few.keep(beat(NOW - 30_000 + number))
    assert len(few._nodes["agx0"].packed) == 2


def test_a_node_that_is_forgotten_has_no_past() -> None:
    history = History()
    history.keep(beat(NOW))
    history.forget("agx0")
    assert times(history) == []
