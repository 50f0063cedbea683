"""WebSockets on a real server: upgrades, frames, refusals, close codes."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from fleet_server.domain.errors import FleetError
from tests.bridge.library import pb
from tests.bridge.raw_http import wait_until
from tests.bridge.served.server import Served, served
from tests.bridge.served.test_streams import Feed


async def closing(socket: Any) -> tuple[int, str]:
    """The close code and reason that the server sends; frames before it are dropped."""
    with pytest.raises(ConnectionClosed) as caught:
        while True:
            await socket.recv()
    received = caught.value.rcvd
    assert received is not None
    return received.code, received.reason


async def refused(it: Served, path: str, **more: Any) -> tuple[int, dict[str, Any], Any]:
    """Status, error object and headers of a refused upgrade."""
    with pytest.raises(InvalidStatus) as caught:
        await it.socket(path, **more)
    response = caught.value.response
    body = json.loads(response.body)
    assert body["request_id"] == response.headers["x-request-id"]
    assert list(body) == ["detail", "code", "reason", "request_id", "violations"]
    return response.status_code, body, response.headers


async def test_a_server_stream_is_one_object_a_text_frame_and_ends_with_1000() -> None:
    async with served() as it, it.socket("/v1/ws?topic=x&count=2", additional_headers={"x-request-id": "r"}) as socket:
        assert socket.response.headers["x-request-id"] == "r"
        frames = [await socket.recv(), await socket.recv()]
        assert frames == ['{"id":"0","text":"x"}', '{"id":"1","text":"x"}']
        assert (await closing(socket))[0] == 1000


async def test_frames_to_a_method_that_reads_none_are_ignored_up_to_the_limit() -> None:
    async with served(frame_queue=1) as it:
        feed = Feed(sure=True)
        it.library.on("Watch", feed)
        async with it.socket("/v1/ws") as socket:
            for frame in ("hello", "{", b"\xff", "x" * 65536):
                await socket.send(frame)
            feed.queue.put_nowait(pb.Event(text="a"))
            assert json.loads(await socket.recv())["text"] == "a"
            await socket.send("é" * 32769)  # 65538 bytes
            assert (await closing(socket))[0] == 1009
        await asyncio.wait_for(feed.closed.wait(), 40)


async def test_a_bidirectional_method_answers_frame_by_frame() -> None:
    async with served() as it, it.socket("/v1/rooms/red/chat") as socket:
        for text, room in (("a", "red"), ("b", "")):  # the path's field rides in the first message
            await socket.send(json.dumps({"text": text}))
            assert json.loads(await socket.recv()) == {"room": room, "text": text}


@pytest.mark.parametrize(
    ("frame", "reason", "code"),
    [
        ("{", "MALFORMED_JSON", 1007),
        ("[]", "INVALID_FIELD", 1007),
        ('{"nothing": 1}', "UNKNOWN_FIELD", 1007),
        ('{"text": 1}', "INVALID_FIELD", 1007),
        ('{"room": "blue"}', "INVALID_FIELD", 1007),
        (b"{}", "MALFORMED_JSON", 1003),
    ],
)
async def test_a_frame_that_is_no_request_is_answered_and_closed(frame: str | bytes, reason: str, code: int) -> None:
    async with served() as it, it.socket("/v1/rooms/red/chat") as socket:
        await socket.send(frame)
        assert json.loads(await socket.recv())["reason"] == reason
        assert await closing(socket) == (code, reason)


async def test_a_refusal_before_the_upgrade_is_an_ordinary_reply() -> None:
    async with served() as it:
        for reason, status in (
            ("API_KEY_MISSING", 401),
            ("ORIGIN_FORBIDDEN", 403),
            ("JOB_NOT_FOUND", 404),
            ("STORE_UNAVAILABLE", 503),
        ):
            it.library.on("Watch", Feed(first=(FleetError(reason, "no"),)))
            code, body, headers = await refused(it, "/v1/ws")
            assert (code, body["reason"]) == (status, reason)
            assert ("retry-after" in headers) == (status == 503)
        assert (await refused(it, "/v1/ws?nothing=1"))[:1] == (400,)
        assert (await refused(it, "/v1/rooms/red/chat?nothing=1"))[0] == 400
        assert (await refused(it, "/v1/rooms/r%2Fd/chat"))[1]["reason"] == "INVALID_PATH"
        assert (await refused(it, "/nothing"))[1]["reason"] == "ROUTE_NOT_FOUND"
        assert (await refused(it, "/v1/watch"))[0] == 404
        bad = await refused(it, "/v1/ws", additional_headers={"grpc-timeout": "x"})
        assert bad[0] == 400


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        ("API_KEY_INVALID", 1008),
        ("SCOPE_MISSING", 1008),
        ("JOB_NOT_FOUND", 1008),
        ("STORE_UNAVAILABLE", 1013),
        ("RATE_LIMITED", 1013),
        ("SHUTTING_DOWN", 1001),
        ("INTERNAL", 1011),
        ("TIMEOUT", 1011),
    ],
)
async def test_an_error_after_the_upgrade_is_the_last_frame_and_has_its_code(reason: str, code: int) -> None:
    async with served() as it:
        it.library.on("Watch", Feed(first=(pb.Event(text="a"), FleetError(reason, "why"))))
        async with it.socket("/v1/ws") as socket:
            await socket.recv()
            error = json.loads(await socket.recv())
            assert (error["reason"], error["detail"]) == (reason, "why")
            assert error["request_id"] == socket.response.headers["x-request-id"]
            assert await closing(socket) == (code, reason)


async def test_the_upgrade_waits_until_the_servicer_is_sure() -> None:
    async with served(head_seconds=1000) as it:
        feed = Feed(sure=True)
        it.library.on("Watch", feed)
        async with it.socket("/v1/ws") as socket:
            feed.queue.put_nowait(None)
            assert (await closing(socket))[0] == 1000
        async with it.socket("/v1/rooms/red/chat"):  # a servicer that reads is sure
            pass
    async with served(head_seconds=0.02) as it:
        it.library.on("Watch", Feed())
        async with it.socket("/v1/ws"):
            pass


async def test_a_client_that_leaves_cancels_the_call() -> None:
    async with served() as it:
        for path in ("/v1/ws", "/v1/rooms/red/chat"):
            feed = Feed(sure=True)
            it.library.on("Watch", feed)
            it.library.on("Chat", feed)
            async with it.socket(path):
                await asyncio.wait_for(feed.entered.wait(), 40)
            await asyncio.wait_for(feed.closed.wait(), 40)
            await wait_until(feed.contexts[0].done)
            assert feed.contexts[0].cancelled()
        await wait_until(lambda: it.bridge.live_streams == 0)


async def test_a_client_that_takes_nothing_is_closed_with_1013() -> None:
    async with served(send_seconds=0.3) as it:
        feed = Feed(sure=True)
        it.library.on("Watch", feed)
        async with it.socket("/v1/ws", max_queue=1, compression=None, max_size=None) as socket:
            socket.transport.pause_reading()
            big = pb.Event(text="x" * 1_000_000)
            while not feed.closed.is_set():
                if feed.queue.qsize() < 4:
                    feed.queue.put_nowait(big)
                await asyncio.sleep(0)
            socket.transport.resume_reading()
            assert (await closing(socket))[0] == 1013
        await wait_until(lambda: it.bridge.live_streams == 0)


async def test_a_shutdown_closes_with_1001() -> None:
    async with served() as it:
        feed = Feed(sure=True)
        it.library.on("Watch", feed)
        async with it.socket("/v1/ws") as socket, it.socket("/v1/rooms/red/chat") as chat:
            await it.bridge.shut_down()
            assert json.loads(await socket.recv())["reason"] == "SHUTTING_DOWN"
            assert await closing(socket) == (1001, "SHUTTING_DOWN")
            assert await closing(chat) == (1001, "SHUTTING_DOWN")
        assert feed.closed.is_set()
        assert (await refused(it, "/v1/ws"))[1]["reason"] == "SHUTTING_DOWN"


async def test_a_servicer_that_takes_no_frames_holds_back_the_client() -> None:
    async with served(frame_queue=2) as it:
        taken: list[str] = []
        go = asyncio.Event()

        async def slow(requests: Any, context: Any) -> Any:
            await context.send_initial_metadata(())
            await go.wait()
            async for request in requests:
                taken.append(request.text)
                yield request

        it.library.on("Chat", slow)
        async with it.socket("/v1/rooms/red/chat") as socket:
            for index in range(20):
                await socket.send(json.dumps({"text": str(index)}))
            go.set()
            for index in range(20):
                assert json.loads(await socket.recv())["text"] == str(index)
        assert taken == [str(index) for index in range(20)]


async def test_a_server_without_the_http_response_extension_still_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    async with served() as it:
        scope = {"type": "websocket", "path": "/nothing", "raw_path": b"/nothing", "headers": [], "query_string": b""}
        await it.bridge(scope, receive, send)
    assert sent == [{"type": "websocket.close", "code": 1008, "reason": "ROUTE_NOT_FOUND"}]
