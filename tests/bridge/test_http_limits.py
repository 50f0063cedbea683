"""The limits of the HTTP/1.1 server, seen from a raw socket on a real uvicorn."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import psutil
import pytest

from fleet_server.bridge import http_limits
from fleet_server.bridge.asgi import ABORT_EXTENSION
from fleet_server.bridge.http_limits import MAX_HEADER_BYTES, MAX_PIPELINED, LimitedWebSocketProtocol, limited_protocol
from tests.bridge.raw_http import (
    Reply,
    connect,
    drip,
    header_time_passes,
    http_reply,
    only_connection,
    serve,
    wait_until,
)


class Echo:
    """Answers with method, path and body; remembers what it was given."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.headers: list[list[tuple[bytes, bytes]]] = []
        self.gate: asyncio.Event | None = None
        self.disconnected = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.paths.append(scope["path"])
        self.headers.append(scope["headers"])
        if scope["path"] == "/unread":
            await http_reply(send, 200, b"early")
            return
        if scope["path"] == "/unread-close":
            await http_reply(send, 413, b"too large", (b"connection", b"close"))
            return
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.disconnected += 1
                return
            body += message["body"]
            more = message["more_body"]
        if self.gate is not None and scope["path"] == "/wait":
            await self.gate.wait()
        text = f"{scope['method']} {scope['path']} ".encode() + body
        await http_reply(send, 200, text)


def check_refusal(reply: Reply, status: int, reason: str, code: str) -> None:
    assert (reply.status, reply.json()["reason"], reply.json()["code"]) == (status, reason, code)
    assert set(reply.json()) == {"detail", "code", "reason", "request_id", "violations"}
    assert reply.json()["request_id"] == reply.headers["x-request-id"] != ""
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["connection"] == "close"


def get(path: str = "/a", *headers: bytes) -> bytes:
    return b"GET " + path.encode() + b" HTTP/1.1\r\nhost: localhost\r\n" + b"".join(headers) + b"\r\n"


UPGRADE = get(
    "/ws",
    b"connection: upgrade\r\n",
    b"upgrade: websocket\r\n",
    b"sec-websocket-version: 13\r\n",
    b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n",
)


async def test_a_header_section_of_exactly_the_limit_is_taken_and_one_byte_more_is_431() -> None:
    async with serve(Echo(), http=limited_protocol()) as server:
        plain = len(get("/a", b"x: \r\n"))
        async with connect(server) as client:
            request = get("/a", b"x: " + b"v" * (MAX_HEADER_BYTES - plain) + b"\r\n")
            assert len(request) == MAX_HEADER_BYTES
            await client.send(request)
            assert (await client.reply()).body == b"GET /a "
            await client.send(get("/a", b"x: " + b"v" * (MAX_HEADER_BYTES - plain + 1) + b"\r\n"))
            check_refusal(await client.reply(), 431, "HEADERS_TOO_LARGE", "RESOURCE_EXHAUSTED")
            assert await client.ended() == b""


@pytest.mark.parametrize(
    "request_bytes",
    [
        get("/a", b"x: " + b"v" * 60_000 + b"\r\n"),
        get("/a", *[b"x-%d: v\r\n" % i for i in range(3000)]),
        get("/" + "a" * 20_000),
        b"POST /a HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\nx: " + b"v" * 20_000 + b"\r\n\r\nhello",
        get("/a", b"x: " + b"v" * 16_300 + b"\r\n", b"y: 1234567890123456789012345678901234567890\r\n"),
    ],
    ids=["one long header", "many headers", "long path", "with a body", "just over"],
)
async def test_oversize_headers_are_431_with_the_error_body(request_bytes: bytes) -> None:
    app = Echo()
    async with serve(app, http=limited_protocol()) as server, connect(server) as client:
        await client.send(request_bytes)
        check_refusal(await client.reply(), 431, "HEADERS_TOO_LARGE", "RESOURCE_EXHAUSTED")
        assert await client.ended() == b""
        assert app.paths == []


@pytest.mark.parametrize("start", [b"GET /a HTTP/1.1\r\nhost: a\r\nx: ", b"GET /", b"GET /a HTTP/1.1\r\nhost: a\r\n"])
async def test_an_endless_header_is_cut_off_and_takes_no_memory(start: bytes) -> None:
    process = psutil.Process()
    async with serve(Echo(), http=limited_protocol()) as server, connect(server) as client:
        before = process.memory_info().rss
        block = b"x: v\r\n" * 10_000 if start.endswith(b"\r\n") else b"v" * 60_000
        sent = 0
        with contextlib.suppress(ConnectionError):
            await client.send(start)
            while sent < 64 << 20:
                await client.send(block)
                sent += len(block)
        assert sent < 64 << 20, "the server took it all"
        assert process.memory_info().rss - before < 16 << 20


async def test_an_endless_header_gets_its_431_where_the_client_reads() -> None:
    async with serve(Echo(), http=limited_protocol()) as server, connect(server) as client:
        await client.send(b"GET /a HTTP/1.1\r\nhost: a\r\nx: " + b"v" * MAX_HEADER_BYTES)
        check_refusal(await client.reply(), 431, "HEADERS_TOO_LARGE", "RESOURCE_EXHAUSTED")
        await client.send(b"v" * 50_000)  # is thrown away: no reset before the reply was read
        client.writer.write_eof()
        assert await client.ended() == b""


LONG = {"http": limited_protocol(header_seconds=600)}


async def test_dripping_headers_are_408_though_bytes_keep_coming() -> None:
    app = Echo()
    async with serve(app, **LONG) as server, connect(server) as client:
        async with asyncio.TaskGroup() as group:
            end = await only_connection(server)
            clock = end._head_timer
            dripping = group.create_task(drip(client, get("/a", b"x: " + b"v" * 3000 + b"\r\n")))
            await wait_until(lambda: end._head_bytes > 5)
            assert end._head_timer is clock, "it runs from the connection on"
            header_time_passes(end)
            check_refusal(await client.reply(), 408, "REQUEST_TIMEOUT", "DEADLINE_EXCEEDED")
            dripping.cancel()
        assert app.paths == []


async def test_dripping_headers_of_a_later_request_are_408() -> None:
    async with serve(Echo(), **LONG) as server, connect(server) as client:
        await client.send(get())
        assert (await client.reply()).status == 200
        end = await only_connection(server)
        assert end._head_timer is None
        await client.send(b"GET /b HTTP/1.1\r\n")
        await wait_until(lambda: end._head_timer is not None)
        header_time_passes(end)
        check_refusal(await client.reply(), 408, "REQUEST_TIMEOUT", "DEADLINE_EXCEEDED")


async def test_headers_in_pieces_are_taken_within_the_time() -> None:
    async with serve(Echo(), http=limited_protocol()) as server, connect(server) as client:
        for byte in get("/pieces"):
            await client.send(bytes([byte]))
        assert (await client.reply()).body == b"GET /pieces "


async def test_a_slow_body_is_not_the_business_of_the_header_clock() -> None:
    app = Echo()
    async with serve(app, **LONG) as server, connect(server) as client:
        await client.send(b"POST /slow HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n\r\nhe")
        await wait_until(lambda: app.paths)
        end = await only_connection(server)
        assert end._head_timer is None
        await client.send(b"llo")
        assert (await client.reply()).body == b"POST /slow hello"


async def test_silent_and_idle_connections_are_closed_without_a_word() -> None:
    async with serve(Echo(), **LONG, timeout_keep_alive=1) as server:
        async with connect(server) as client:
            header_time_passes(await only_connection(server))
            assert await client.ended() == b""
        async with connect(server) as client:
            await client.send(get())
            assert (await client.reply()).status == 200
            assert await client.ended() == b""


async def test_pipelined_requests_are_answered_in_order_and_a_bad_one_after_the_good() -> None:
    app = Echo()
    app.gate = asyncio.Event()
    async with serve(app, http=limited_protocol()) as server, connect(server) as client:
        await client.send(get("/wait") + get("/b") + get("/c", b"x: " + b"v" * 20_000 + b"\r\n") + get("/d"))
        await wait_until(lambda: app.paths)
        app.gate.set()
        assert (await client.reply()).body == b"GET /wait "
        assert (await client.reply()).body == b"GET /b "
        check_refusal(await client.reply(), 431, "HEADERS_TOO_LARGE", "RESOURCE_EXHAUSTED")
        assert await client.ended() == b""
        assert app.paths == ["/wait", "/b"]


async def test_too_deep_a_pipeline_is_refused_after_what_was_taken() -> None:
    app = Echo()
    app.gate = asyncio.Event()
    async with serve(app, http=limited_protocol()) as server, connect(server) as client:
        await client.send(get("/wait") + get("/p") * (MAX_PIPELINED + 50))
        await wait_until(lambda: app.paths)
        app.gate.set()
        replies = [await client.reply() for _ in range(MAX_PIPELINED + 1)]
        assert {reply.status for reply in replies} == {200}
        check_refusal(await client.reply(), 429, "RATE_LIMITED", "RESOURCE_EXHAUSTED")


async def test_a_client_that_leaves_is_noticed_by_the_request_that_runs_not_only_by_the_newest() -> None:
    left = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        if (await receive())["type"] == "http.disconnect":
            left.set()

    async with serve(app, http=limited_protocol()) as server:
        async with connect(server) as client:
            await client.send(get("/one") + get("/two"))
        async with asyncio.timeout(50):
            await left.wait()


async def test_chunked_bodies_pass_and_trailers_do_not_become_headers() -> None:
    app = Echo()
    async with serve(app, http=limited_protocol()) as server, connect(server) as client:
        head = b"POST /c HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"
        for _ in range(2):
            await client.send(head + b"5\r\nhello\r\n6;x=y\r\n world\r\n0\r\n")
            await client.send(b"x-api-key: stolen\r\n\r\n")
            assert (await client.reply()).body == b"POST /c hello world"
        assert all(name != b"x-api-key" for headers in app.headers for name, _ in headers)


async def test_a_large_chunked_body_passes() -> None:
    async with serve(Echo(), http=limited_protocol()) as server, connect(server) as client:
        await client.send(b"POST /c HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n")
        for _ in range(40):
            await client.send(b"8000\r\n" + b"b" * 0x8000 + b"\r\n")
        await client.send(b"0\r\n\r\n")
        assert len((await client.reply()).body) == len("POST /c ") + 40 * 0x8000


@pytest.mark.parametrize("endless", [b"0\r\nx-trail: ", b"5;ext="], ids=["trailer", "chunk extension"])
async def test_endless_trailers_and_chunk_extensions_are_cut_off(endless: bytes) -> None:
    app = Echo()
    async with serve(app, http=limited_protocol()) as server, connect(server) as client:
        await client.send(b"POST /c HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n")
        await wait_until(lambda: app.paths)
        await client.send(endless)
        for _ in range(4):
            await client.send(b"v" * 8_000)
        check_refusal(await client.reply(), 431, "HEADERS_TOO_LARGE", "RESOURCE_EXHAUSTED")
        await wait_until(lambda: app.disconnected)


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"not http at all\r\n\r\n",
        b"GET /a HTTP/1.1\r\nhost: a\r\nbad header\r\n\r\n",
        b"POST /a HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /a HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\nabc",
        b"GET \xff\xfe HTTP/1.1\r\nhost: a\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
async def test_what_is_not_http_is_400_in_json(request_bytes: bytes) -> None:
    app = Echo()
    async with serve(app, http=limited_protocol()) as server, connect(server) as client:
        await client.send(request_bytes)
        check_refusal(await client.reply(), 400, "INVALID_PATH", "INVALID_ARGUMENT")
        assert await client.ended() == b""


async def test_a_broken_chunk_ends_the_request_that_it_belongs_to() -> None:
    app = Echo()
    async with serve(app, http=limited_protocol()) as server, connect(server) as client:
        await client.send(b"POST /c HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nZZ\r\n")
        check_refusal(await client.reply(), 400, "INVALID_PATH", "INVALID_ARGUMENT")
        await wait_until(lambda: app.disconnected)


async def test_connections_beyond_the_limit_get_429_and_room_is_made_by_closing() -> None:
    async with serve(Echo(), http=limited_protocol(max_connections=2)) as server:
        async with connect(server) as first, connect(server) as second:
            for client in (first, second):
                await client.send(get())
                assert (await client.reply()).status == 200
            async with connect(server) as third:
                reply = await third.reply()
                check_refusal(reply, 429, "TOO_MANY_CONNECTIONS", "RESOURCE_EXHAUSTED")
                assert reply.headers["retry-after"] == "1"
            await first.send(get())
            assert (await first.reply()).status == 200
        await wait_until(lambda: not server.server_state.connections)
        async with connect(server) as client:
            await client.send(get())
            assert (await client.reply()).status == 200


async def test_far_beyond_the_limit_connections_are_dropped_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # Those that were refused stay until all are there.
    monkeypatch.setattr(http_limits, "_LINGER_SECONDS", 600)
    protocol = limited_protocol(max_connections=0)
    async with serve(Echo(), http=protocol) as server, contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(connect(server)) for _ in range(64)]
        for client in clients:
            check_refusal(await client.reply(), 429, "TOO_MANY_CONNECTIONS", "RESOURCE_EXHAUSTED")
        extra = await stack.enter_async_context(connect(server))
        assert await extra.ended() == b""


@pytest.mark.parametrize("path", [b"/unread", b"/unread-close"])
async def test_a_body_that_the_application_does_not_want_is_not_taken(path: bytes) -> None:
    """The reply is readable although 200 MB were announced, and only a little of them is taken."""
    size = 200 << 20
    async with serve(Echo(), http=limited_protocol()) as server, connect(server) as client:
        await client.send(b"POST " + path + b" HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % size)
        assert (await client.reply()).body in (b"early", b"too large")
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < size:
                await client.send(b"x" * 65536)
                sent += 65536
        assert sent < 32 << 20


async def test_a_short_body_that_nobody_read_leaves_the_connection_usable() -> None:
    async with serve(Echo(), http=limited_protocol()) as server, connect(server) as client:
        await client.send(b"POST /unread HTTP/1.1\r\nhost: a\r\ncontent-length: 10\r\n\r\n")
        assert (await client.reply()).body == b"early"
        await client.send(b"0123456789" + get("/next"))
        assert (await client.reply()).body == b"GET /next "


async def test_an_unknown_upgrade_is_answered_as_http_and_ends_the_connection() -> None:
    async with serve(Echo(), http=limited_protocol()) as server, connect(server) as client:
        await client.send(get("/h2c", b"connection: upgrade\r\n", b"upgrade: h2c\r\n"))
        reply = await client.reply()
        assert (reply.body, reply.headers["connection"]) == (b"GET /h2c ", "close")
        assert await client.ended() == b""


async def test_websockets_are_upgraded_and_count_as_connections() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "websocket"
        await receive()
        await send({"type": "websocket.accept"})
        await receive()

    protocol = limited_protocol(max_connections=2)
    async with serve(app, http=protocol, ws=LimitedWebSocketProtocol) as server, connect(server) as client:
        end = await only_connection(server)
        await client.send(UPGRADE)
        assert (await client.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101")
        assert end._head_timer is None
        async with connect(server), connect(server) as third:
            check_refusal(await third.reply(), 429, "TOO_MANY_CONNECTIONS", "RESOURCE_EXHAUSTED")
        await client.send(bytes([0x88, 0x80, 0, 0, 0, 0]))
        assert (await client.reader.read(2))[:1] == b"\x88"


async def test_the_application_can_drop_a_connection_at_once() -> None:
    """Without waiting for a peer that reads nothing: the rest of the reply is never sent."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.accept"})
        else:
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"9")]})
        scope["extensions"][ABORT_EXTENSION]()
        while (await receive())["type"] not in ("http.disconnect", "websocket.disconnect"):
            pass

    settings: dict[str, Any] = {"http": limited_protocol(), "ws": LimitedWebSocketProtocol, "log_level": "critical"}
    async with serve(app, **settings) as server:
        for request in (get(), UPGRADE):
            async with connect(server) as client:
                await client.send(request)
                await client.ended()
            await wait_until(lambda: not server.server_state.connections)
