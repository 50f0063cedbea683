"""The bridge on a real server with all its limits: what a rude client sends is not taken."""

from __future__ import annotations

import contextlib
from typing import Any

import psutil
import pytest

from fleet_server.bridge.guard import HostOriginGuard
from fleet_server.bridge.http_limits import LimitedWebSocketProtocol, limited_protocol
from tests.bridge.library import Library, bridge_of
from tests.bridge.raw_http import connect, serve

HEAD = b"POST /v1/books HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
BLOCK = b"x" * 65536
SIZE = 200 << 20


def app_of(library: Library) -> HostOriginGuard:
    return HostOriginGuard(bridge_of(library))


@pytest.mark.parametrize("chunked", [False, True], ids=["announced", "chunked"])
async def test_a_huge_body_is_413_and_is_not_taken(chunked: bool) -> None:
    library, process = Library(), psutil.Process()
    async with serve(app_of(library), http=limited_protocol()) as server, connect(server) as client:
        before = process.memory_info().rss
        framing = b"transfer-encoding: chunked" if chunked else b"content-length: %d" % SIZE
        await client.send(HEAD + framing + b"\r\n\r\n")
        piece = b"%x\r\n%b\r\n" % (len(BLOCK), BLOCK) if chunked else BLOCK
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < SIZE:
                await client.send(piece)
                sent += len(piece)
        assert sent < 32 << 20, "the server took it all"
        assert process.memory_info().rss - before < 32 << 20
        assert library.requests == []


async def test_the_413_of_an_announced_body_is_readable_before_any_of_it_is_sent() -> None:
    async with serve(app_of(Library()), http=limited_protocol()) as server, connect(server) as client:
        await client.send(HEAD + b"content-length: %d\r\n\r\n" % SIZE)
        reply = await client.reply()
        assert (reply.status, reply.json()["reason"]) == (413, "BODY_TOO_LARGE")


async def test_the_413_is_readable_by_a_client_that_first_sends_all() -> None:
    async with serve(app_of(Library()), http=limited_protocol()) as server, connect(server) as client:
        body = b" " * ((1 << 20) + 1)
        await client.send(HEAD + b"content-length: %d\r\n\r\n" % len(body) + body[: 200 << 10])
        reply = await client.reply()
        assert (reply.status, reply.json()["reason"]) == (413, "BODY_TOO_LARGE")


async def test_a_body_within_the_limit_passes_in_any_framing() -> None:
    library = Library()
    async with serve(app_of(library), http=limited_protocol()) as server, connect(server) as client:
        body = b'{"title": "%b"}' % (b"t" * 900_000)
        await client.send(HEAD + b"content-length: %d\r\n\r\n" % len(body) + body)
        assert (await client.reply()).json()["title"] == "t" * 900_000
        await client.send(HEAD + b"transfer-encoding: chunked\r\n\r\n")
        for start in range(0, len(body), 50_000):
            part = body[start : start + 50_000]
            await client.send(b"%x\r\n%b\r\n" % (len(part), part))
        await client.send(b"0\r\n\r\n")
        assert (await client.reply()).json()["title"] == "t" * 900_000
        assert len(library.requests) == 2


async def test_a_body_that_came_with_its_head_is_measured_too() -> None:
    """The method takes 64 bytes; the second of two equal requests takes the way of those that are known."""
    library = Library()
    async with serve(app_of(library), http=limited_protocol()) as server, connect(server) as client:
        for size, status in ((64, 200), (65, 413)):
            for framed in (b"content-length: %d\r\n\r\n%b", b"transfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n"):
                for _ in range(2):
                    await client.send(HEAD.replace(b"/books", b"/raw/a") + framed % (size, b"x" * size))
                    assert (await client.reply()).status == status
        requests: list[Any] = [*library.requests]
        assert [request.file.data for request in requests] == [b"x" * 64] * 4


async def test_a_head_has_the_length_of_its_body_and_no_body() -> None:
    async with serve(app_of(Library()), http=limited_protocol()) as server, connect(server) as client:
        get = b"GET /v1/books/a HTTP/1.1\r\nhost: localhost\r\nx-request-id: r1\r\n\r\n"
        await client.send(get)
        reply = await client.reply()
        await client.send(get.replace(b"GET", b"HEAD"))
        head = (await client.reader.readuntil(b"\r\n\r\n")).lower()
        assert b"content-length: %d\r\n" % len(reply.body) in head
        assert b"content-type: application/json\r\n" in head
        assert b"x-request-id: r1\r\n" in head
        await client.send(get)
        assert await client.reader.readexactly(8) == b"HTTP/1.1"


async def test_a_websocket_passes_guard_limits_and_bridge() -> None:
    settings = {"http": limited_protocol(), "ws": LimitedWebSocketProtocol}
    request = (
        b"GET /v1/ws?topic=t&count=1 HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
        b"sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    )
    async with serve(app_of(Library()), **settings) as server:
        async with connect(server) as client:
            await client.send(request + b"\r\n")
            assert (await client.reader.readline()).split()[1] == b"101"
            assert b'{"id":"0","text":"t"}' in await client.ended()
        async with connect(server) as client:
            await client.send(request + b"origin: https://evil.example\r\n\r\n")
            assert (await client.reply()).json()["reason"] == "ORIGIN_FORBIDDEN"
