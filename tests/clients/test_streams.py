"""Both clients on a real connection: what is asked, what breaks, where it goes on."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from fleet_client import (
    ApiError,
    AsyncFleetCommander,
    ConnectionFailedError,
    FleetCommander,
    JobFailedError,
    WaitTimeoutError,
)

from tests.clients.serving import complete, event, job, reply, serving, stream

Client = FleetCommander | AsyncFleetCommander
Call = Callable[..., Awaitable[Any]]


@pytest.fixture(params=["blocking", "asyncio"])
def using(request: pytest.FixtureRequest) -> Call:
    """Calls a method of one of the two clients; of a stream all that comes, or the first `take`."""

    async def call(url: str, method: str, *arguments: Any, take: int | None = None, **options: Any) -> Any:
        if request.param == "blocking":
            with FleetCommander(url, patience_seconds=5) as client:
                answer = getattr(client, method)(*arguments, **options)
                return _first(answer, take) if method.startswith("watch") else answer
        async with AsyncFleetCommander(url, patience_seconds=5) as twin:
            answer = getattr(twin, method)(*arguments, **options)
            if not method.startswith("watch"):
                return await answer
            seen = []
            async for one in answer:
                seen.append(one)
                if len(seen) == take:
                    await answer.aclose()
                    break
            return seen

    return call


def _first(answer: Any, take: int | None) -> list[Any]:
    seen = []
    for one in answer:
        seen.append(one)
        if len(seen) == take:
            answer.close()
            break
    return seen


async def test_a_job_is_watched_to_its_end(using: Call) -> None:
    update, end = event("job_update", job(), "1-0"), complete()
    with serving(stream(update, end, event("job_update", job(), "10-0"))) as server:
        assert await using(server.url, "watch_job", "a/b", previews=True) == [update, end]
        request = server.asked[0]
    assert request.url.path == "/api/queue/jobs/a%2Fb/events" or request.scope["raw_path"].endswith(b"a%2Fb/events")
    assert request.url.query == "previews=true"
    assert request.headers["accept"] == "text/event-stream"


async def test_a_broken_watch_is_taken_up_where_it_broke(using: Call) -> None:
    update, progress = event("job_update", job(), "4-0"), event("job_progress", {"progress": 5})
    with serving(stream(update, progress, broken=True), stream(complete())) as server:
        seen = await using(server.url, "watch_job", "j")
        asked = [request.headers.get("last-event-id") for request in server.asked]
    assert [one["type"] for one in seen] == ["job_update", "job_progress", "job_complete"]
    assert asked == [None, "4-0"]


async def test_a_server_that_stops_is_waited_for(using: Call) -> None:
    stopping = {"detail": "the server is being shut down", "code": "UNAVAILABLE", "reason": "SHUTTING_DOWN"}
    refusal = reply(stopping, 503)
    with serving(stream(event("job_update", job(), "1-0"), error=stopping), refusal, stream(complete())) as server:
        assert (await using(server.url, "wait", "j"))["status"] == "succeeded"
        assert len(server.asked) == 3


async def test_a_stream_that_ends_too_early_is_taken_up_again(using: Call) -> None:
    with serving(stream(event("job_update", job(), "1-0")), stream(complete())) as server:
        assert (await using(server.url, "wait", "j"))["status"] == "succeeded"


async def test_events_go_on_after_the_last_one_seen(using: Call) -> None:
    first, second = event("job_update", job(), "1-0"), event("job_update", job(), "2-0")
    with serving(stream(first, broken=True), stream(second)) as server:
        assert await using(server.url, "watch_events", take=2, type=["job_update"], job_id=None) == [first, second]
        assert [request.url.query for request in server.asked[:2]] == ["type=job_update"] * 2
        assert server.asked[1].headers["last-event-id"] == "1-0"


async def test_events_that_cannot_be_asked_for_again_are_a_gap(using: Call) -> None:
    tick = event("job_progress", {"progress": 5})
    with serving(stream(tick, broken=True), stream(tick)) as server:
        seen = await using(server.url, "watch_events", take=3)
    assert [one["type"] for one in seen] == ["job_progress", "gap", "job_progress"]


async def test_with_since_nothing_is_lost(using: Call) -> None:
    tick = event("job_progress", {"progress": 5})
    with serving(stream(tick, broken=True), stream(tick)) as server:
        seen = await using(server.url, "watch_events", take=2, since="7-0")
        assert [request.url.query for request in server.asked[:2]] == ["since=7-0"] * 2
    assert [one["type"] for one in seen] == ["job_progress", "job_progress"]


async def test_an_unknown_job_is_not_waited_for(using: Call) -> None:
    missing = {"detail": "there is no job 'j'", "code": "NOT_FOUND", "reason": "JOB_NOT_FOUND", "violations": []}
    with serving(reply(missing, 404)) as server:
        with pytest.raises(ApiError, match="there is no job") as raised:
            await using(server.url, "wait", "j")
        assert (raised.value.status, raised.value.reason) == (404, "JOB_NOT_FOUND")
        assert len(server.asked) == 1


async def test_a_job_that_failed_is_an_error(using: Call) -> None:
    error = {"detail": "the engine ran out of memory", "code": "INTERNAL", "reason": "OUT_OF_MEMORY"}
    ended = serving(stream(complete("failed", error=error)))
    with ended as server, pytest.raises(JobFailedError, match="out of memory") as raised:
        await using(server.url, "wait", "j")
    assert raised.value.reason == "OUT_OF_MEMORY"
    assert raised.value.job["status"] == "failed"


async def test_a_cancelled_job_is_an_error(using: Call) -> None:
    ended = serving(stream(complete("cancelled")))
    with ended as server, pytest.raises(JobFailedError, match="was cancelled") as raised:
        await using(server.url, "wait", "j")
    assert raised.value.reason == "CANCELLED"


async def test_a_wait_has_its_limit(using: Call) -> None:
    late = {"detail": "the call took too long", "code": "DEADLINE_EXCEEDED", "reason": "TIMEOUT"}
    with serving(stream(event("job_update", job(), "1-0"), error=late)) as server:
        with pytest.raises(WaitTimeoutError, match="within 30 s"):
            await using(server.url, "wait", "j", timeout_seconds=30)
        assert 29_000 < int(server.asked[0].headers["grpc-timeout"].removesuffix("m")) <= 30_001


async def test_nobody_there(using: Call) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        for method, arguments in (("status", ()), ("wait", ("j",)), ("watch_events", ())):
            with pytest.raises(ConnectionFailedError, match=f"{url} cannot be reached"):
                await using(url, method, *arguments)


async def test_the_key_goes_with_every_call(using: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEET_API_KEY", "of-the-test")
    with serving(reply({}), stream(complete())) as server:
        await using(server.url, "status")
        await using(server.url, "watch_job", "j")
        assert [request.headers["x-api-key"] for request in server.asked] == ["of-the-test"] * 2


async def test_submits_leave_out_what_is_none(using: Call) -> None:
    with serving(reply({"job_id": "j"}), reply({"job_id": "j"}), reply({"jobs": []}), reply({})) as server:
        await using(server.url, "queue_job", "a sunset", "high", None, seed=1 << 60, model=None)
        await using(server.url, "submit_job", {"job_type": "custom", "payload": {}, "callback_url": None})
        await using(server.url, "submit_batch", [{"job_type": "custom", "payload": {}}])
        await using(server.url, "retry_job", "j")
        assert server.bodies == [
            {"job_type": "image_gen", "priority": "high", "payload": {"prompt": "a sunset", "seed": str(1 << 60)}},
            {"job_type": "custom", "payload": {}},
            {"jobs": [{"job_type": "custom", "payload": {}}]},
            None,
        ]
        assert server.asked[3].url.query == ""


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        (b"<html>Bad gateway</html>", "HTTP status 502: <html>Bad gateway</html>"),
        (b"[1]", "HTTP status 502: [1]"),
        (b"", "HTTP status 502: Bad Gateway"),
        (b'{"detail": null}', "HTTP status 502"),
    ],
)
async def test_answers_of_others_are_errors_too(using: Call, body: bytes, detail: str) -> None:
    answer = reply({}, 502, retry_after="7")
    answer.body = body
    answer.headers["content-length"] = str(len(body))
    with serving(answer) as server, pytest.raises(ApiError) as raised:
        await using(server.url, "status")
    assert (raised.value.detail, raised.value.retry_after_seconds) == (detail, 7)


def test_a_call_waits_no_longer_than_it_is_told() -> None:
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        with (
            FleetCommander(f"http://127.0.0.1:{mute.getsockname()[1]}", timeout_seconds=0.05) as client,
            pytest.raises(ConnectionFailedError, match="did not answer in time"),
        ):
            client.status()


def test_connecting_is_given_less_time_than_the_answer() -> None:
    with FleetCommander() as client:
        assert client.session.timeout == httpx.Timeout(35, connect=5)
