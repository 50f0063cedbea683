"""The parts of sending by themselves: turns of receivers, bodies, names, the file of the secret."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from fleet.v1 import types_pb2

from fleet_server.domain.webhook_signature import SecretError
from fleet_server.services.webhook_body import KEPT_OUTPUTS, LIMIT_BYTES, callback_body
from fleet_server.services.webhook_hosts import HostLimits, Hosts
from fleet_server.services.webhook_names import NoSuchNameError, SystemNames
from fleet_server.services.webhook_secrets import load_secrets
from tests.waiting import wait_until
from tests.webhooks.works import CODEC, SECRET

LIMITS = HostLimits(total=4, per_host=2, defer_seconds=10.0, first_guess_seconds=1.0)


def turns(hosts: Hosts[int]) -> list[str]:
    """Whoever may begin now."""
    found = []
    while (turn := hosts.next()) is not None:
        found.append(turn[0])
    return found


def test_receivers_take_turns_within_their_limits() -> None:
    hosts: Hosts[int] = Hosts(LIMITS)
    for number in range(4):
        assert hosts.offer("a", number, 0.0) is None
    for host in ("b", "c"):
        assert hosts.offer(host, 9, 0.0) is None
    assert turns(hosts) == ["a", "b", "c", "a"]
    hosts.offer("d", 9, 0.0)
    assert not hosts.startable and turns(hosts) == [], "there are four"
    hosts.finished("b", answered=True, seconds=0.1)
    assert hosts.startable and turns(hosts) == ["d"]
    hosts.finished("c", answered=True, seconds=0.1)
    assert turns(hosts) == [], "the first has its two"
    hosts.finished("a", answered=True, seconds=0.1)
    assert turns(hosts) == ["a"]


def test_what_has_no_room_comes_back_at_the_receivers_own_pace() -> None:
    hosts: Hosts[int] = Hosts(LIMITS)
    for number in range(4):
        hosts.offer("a", number, 100.0)
    assert [hosts.offer("a", number, 100.0) for number in range(3)] == [0.5, 1.0, 1.5]
    assert hosts.offer("b", 0, 100.0) is None
    assert max(hosts.offer("a", number, 100.0) or 0 for number in range(50)) == 10.0


def test_a_silent_receiver_gets_one_at_a_time_until_it_answers() -> None:
    hosts: Hosts[int] = Hosts(LIMITS)
    for _ in range(3):
        hosts.offer("a", 0, 0.0)
        assert turns(hosts) == ["a"]
        hosts.finished("a", answered=False, seconds=15.0)
    assert [hosts.offer("a", 0, 0.0) is None for _ in range(3)] == [True, True, False]
    assert turns(hosts) == ["a"]
    hosts.finished("a", answered=True, seconds=0.1)
    hosts.offer("a", 0, 0.0)
    assert turns(hosts) == ["a", "a"]


def test_all_silent_receivers_together_leave_half_to_the_others() -> None:
    hosts: Hosts[int] = Hosts(LIMITS)
    dead = [f"dead-{number}" for number in range(6)]
    for host in dead:
        for _ in range(3):
            hosts.offer(host, 0, 0.0)
            assert turns(hosts) == [host]
            hosts.finished(host, answered=False, seconds=15.0)
    taken = [hosts.offer(host, 0, 0.0) is None for host in dead]
    assert taken == [True] * 4 + [False] * 2
    assert turns(hosts) == dead[:2]
    hosts.offer("fine", 0, 0.0)
    hosts.offer("fine", 0, 0.0)
    assert turns(hosts) == ["fine", "fine"]
    hosts.finished(dead[0], answered=True, seconds=1.0)
    assert turns(hosts) == [dead[2]]


def test_room_is_what_is_left_and_comes_back() -> None:
    hosts: Hosts[int] = Hosts(LIMITS)
    assert hosts.room == 12
    hosts.offer("a", 1, 0.0)
    hosts.offer("a", 2, 0.0)
    assert hosts.next() == ("a", 1)
    assert (hosts.room, hosts.active) == (10, 1)
    assert hosts.drain() == [2]
    hosts.skipped("a")
    assert (hosts.room, hosts.active) == (12, 0)


def job(**result: Any) -> types_pb2.Job:
    """An ended job."""
    made = types_pb2.Job(job_id="j", generation=1, result=types_pb2.JobResult(**result))
    made.end_time.FromMilliseconds(1_763_805_600_123)
    return made


def told(made: types_pb2.Job) -> Any:
    before = made.SerializeToString(deterministic=True)
    body = callback_body(CODEC, made)
    assert len(body) < LIMIT_BYTES
    assert made.SerializeToString(deterministic=True) == before, "the job itself is not to be changed"
    return orjson.loads(body)


def outputs(count: int, size: int = 0) -> list[types_pb2.Output]:
    return [types_pb2.Output(filename=f"{number}.png", url="u" * size) for number in range(count)]


def attempts(count: int, size: int) -> list[types_pb2.JobAttempt]:
    return [types_pb2.JobAttempt(error=types_pb2.JobError(detail="x" * size)) for _ in range(count)]


def test_a_body_is_the_job_as_events_have_it() -> None:
    made = job(text="all", outputs=outputs(40))
    made.attempts.extend(attempts(3, 10))
    body = told(made)
    assert body == {"type": "job.complete", "timestamp": "2025-11-22T10:00:00.123Z", "data": CODEC.encode(made)}


def test_a_long_body_is_emptied_in_order_and_no_more_than_it_must() -> None:
    def kept(made: types_pb2.Job) -> tuple[int, bool, int, int]:
        data = told(made)["data"]
        result = data["result"]
        return len(data["attempts"]), result["text"] is not None, len(result["segments"]), len(result["outputs"])

    segments = [types_pb2.TranscriptSegment(text="s" * 100) for _ in range(30)]
    fat = job(text="t" * 4_000, segments=segments, outputs=outputs(20, 50))
    fat.attempts.extend(attempts(20, 900))
    assert kept(fat) == (0, True, 30, 20)
    fat.result.text = "t" * 16_000
    assert kept(fat) == (0, False, 30, 20)
    fat.result.segments.extend(segments * 4)
    assert kept(fat) == (0, False, 0, 20)
    fat.result.outputs.extend(outputs(100, 50))
    assert kept(fat) == (0, False, 0, KEPT_OUTPUTS)


def test_no_job_makes_a_body_too_long() -> None:
    worst = job(text="t" * 10**6, outputs=outputs(50, 3_000))
    worst.error.detail = "e" * 10**6
    worst.target_labels.update({f"label-{number}": "v" * 1_000 for number in range(30)})
    data = told(worst)["data"]
    assert data["error"]["detail"] == "e" * 1_000
    assert data["result"]["outputs"] == []


async def test_the_machines_resolver_is_asked() -> None:
    names = SystemNames()
    assert "127.0.0.1" in {str(address) for address in await names.addresses("localhost")}
    for host in ("nowhere.invalid", "x" * 64 + ".example", "a" * 300):
        with pytest.raises(NoSuchNameError):
            await names.addresses(host)


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A resolver that knows localhost alone and gets stuck at any other name; the names that it was asked for."""
    asked: list[str] = []
    release = threading.Event()
    real = socket.getaddrinfo

    def look_up(host: str, *rest: Any, **more: Any) -> Any:
        asked.append(host)
        if host != "localhost":
            release.wait(50)
            raise OSError
        return real(host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    yield asked
    release.set()


async def test_a_stuck_name_holds_one_thread_however_many_ask(stuck: list[str]) -> None:
    names = SystemNames(threads=2)
    waiting = [asyncio.create_task(names.addresses("stuck.example")) for _ in range(10)]
    await wait_until(lambda: stuck)
    assert await names.addresses("localhost")
    assert stuck == ["stuck.example", "localhost"]
    # Those who asked may leave; the look-up is not lost on others, and no error is left unseen.
    for task in waiting:
        task.cancel()
    await asyncio.wait(waiting)
    await names.aclose()


async def test_threads_are_bounded(stuck: list[str]) -> None:
    names = SystemNames(threads=2)
    waiting = [asyncio.create_task(names.addresses(f"{number}.example")) for number in range(5)]
    await wait_until(lambda: len(stuck) == 2)
    waiting.append(asyncio.create_task(names.addresses("localhost")))
    for _ in range(10):
        await asyncio.sleep(0)
    assert len(stuck) == 2
    await names.aclose()
    await asyncio.gather(*waiting, return_exceptions=True)


def test_a_secret_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    first = load_secrets(folder, None, None)
    path = folder / "webhook-secret"
    assert first.made == path
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_text() == first.book.default[0].text + "\n"
    assert len(first.book.default[0].key) >= 24
    again = load_secrets(folder, None, None)
    assert (again.made, again.book) == (None, first.book)
    assert [entry.name for entry in folder.iterdir()] == ["webhook-secret"]


def test_servers_that_start_at_once_on_one_folder_agree(tmp_path: Path) -> None:
    loaded: list[Any] = []
    threads = [threading.Thread(target=lambda: loaded.append(load_secrets(tmp_path, None, None))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({one.book.default[0].text for one in loaded}) == 1
    assert sum(one.made is not None for one in loaded) == 1


def test_a_given_secret_makes_no_file(tmp_path: Path) -> None:
    assert load_secrets(tmp_path, SECRET.text, None).book.default == (SECRET,)
    assert list(tmp_path.iterdir()) == []


def test_files_that_cannot_be_used_stop_the_start(tmp_path: Path) -> None:
    (tmp_path / "webhook-secret").write_text("whsec_short")
    with pytest.raises(SecretError, match=r"webhook-secret: .*remove it"):
        load_secrets(tmp_path, None, None)
    with pytest.raises(SecretError, match=r"FLEET_WEBHOOK_SECRETS_FILE: .*cannot be read"):
        load_secrets(tmp_path, SECRET.text, tmp_path / "none")
    lines = tmp_path / "lines"
    lines.write_text(f"https://a.example {SECRET.text}\n")
    assert len(load_secrets(tmp_path, SECRET.text, lines).book.endpoints) == 1
