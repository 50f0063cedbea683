"""The short ways for bodies and replies that are at hand as a whole, from a raw socket on a real uvicorn."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from fleet_server.bridge.asgi import BODY_EXTENSION, REPLY_EXTENSION
from fleet_server.bridge.http_exchange import Connection
from fleet_server.bridge.http_limits import limited_protocol
from tests.bridge.raw_http import connect, http_reply, serve, wait_until

POST = b"POST /p HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n\r\n"
GET = b"GET /g HTTP/1.1\r\nhost: a\r\n\r\n"


def length(body: bytes) -> tuple[bytes, bytes]:
    return (b"content-length", b"%d" % len(body))


class Short:
    """Echoes the body by the short ways; remembers which bodies were at hand and what came after them."""

    def __init__(self) -> None:
        self.at_hand: list[bytes | None] = []
        self.later: list[dict[str, Any]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = scope["extensions"][BODY_EXTENSION]()
        self.at_hand.append(body)
        while body is None:
            message = await receive()
            self.later.append(message)
            body = None if message.get("more_body") else b"".join(each["body"] for each in self.later)
        await scope["extensions"][REPLY_EXTENSION](200, [length(body)], body)
        self.later.append(await receive())


async def test_a_body_that_came_with_its_head_is_at_hand_and_the_connection_goes_on() -> None:
    app = Short()
    async with serve(app, http=limited_protocol()) as server, connect(server) as client:
        for request, body in ((POST + b"hello", b"hello"), (GET, b""), (POST + b"again", b"again")):
            await client.send(request)
            reply = await client.reply()
            assert (reply.status, reply.body) == (200, body)
            assert "date" in reply.headers
            assert "connection" not in reply.headers
        await wait_until(lambda: len(app.later) == 3)
        assert app.at_hand == [b"hello", b"", b"again"]
        assert [message["type"] for message in app.later] == ["http.disconnect"] * 3


async def test_a_body_still_coming_is_received_as_ever() -> None:
    app = Short()
    async with serve(app, http=limited_protocol()) as server, connect(server) as client:
        await client.send(POST + b"he")
        await wait_until(lambda: app.at_hand)
        await client.send(b"llo")
        assert (await client.reply()).body == b"hello"
        assert app.at_hand == [None]


async def test_a_body_is_taken_once() -> None:
    taken: list[bytes | None] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        taken.append(scope["extensions"][BODY_EXTENSION]())
        taken.append((await asyncio.wait_for(asyncio.shield(asyncio.ensure_future(receive())), 50))["type"])

    async with serve(app, http=limited_protocol()) as server:
        async with connect(server) as client:
            await client.send(POST + b"hello")
            await wait_until(lambda: taken)
        await wait_until(lambda: len(taken) == 2)
    assert taken == [b"hello", "http.disconnect"]


@pytest.mark.parametrize("size", [0, 1, 64 * 1024 - 1, 64 * 1024, 5_000_000])
async def test_replies_of_every_size_are_whole(size: int) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        body = b"x" * size
        headers = [length(body), (b"x-a", b"b")]
        made_ready = b"content-length: %d\r\nx-a: b\r\n" % size
        await scope["extensions"][REPLY_EXTENSION](200, made_ready if scope["path"] == "/g" else headers, body)

    async with serve(app, http=limited_protocol()) as server, connect(server) as client:
        for path in (b"/g", b"/headers"):
            await client.send(GET.replace(b"/g", path))
            reply = await client.reply()
            assert (reply.status, reply.headers["x-a"], reply.body) == (200, "b", b"x" * size)


def test_the_headers_of_every_reply_are_those_that_the_server_has_now() -> None:
    connection = Connection(asyncio.Transport(), lambda: None)
    first, second = [(b"date", b"now")], [(b"date", b"then"), (b"x-a", b"b")]
    for headers, lines in ((first, b"date: now\r\n"), (second, b"date: then\r\nx-a: b\r\n"), ([], b"")):
        assert connection.default_lines(headers) == connection.default_lines(headers) == lines


@pytest.mark.parametrize(
    "request_bytes", [b"GET / HTTP/1.0\r\n\r\n", GET.replace(b"host", b"connection: close\r\nhost")]
)
async def test_a_connection_that_shall_end_is_said_to_end_and_ends(request_bytes: bytes) -> None:
    async with serve(Short(), http=limited_protocol()) as server, connect(server) as client:
        await client.send(request_bytes)
        reply = await client.reply()
        assert (reply.status, reply.headers["connection"]) == (200, "close")
        assert await client.ended() == b""


async def test_pipelined_requests_are_answered_in_order() -> None:
    app = Short()
    async with serve(app, http=limited_protocol()) as server, connect(server) as client:
        await client.send(POST + b"first" + POST + b"other" + GET)
        assert [(await client.reply()).body for _ in range(3)] == [b"first", b"other", b""]


@pytest.mark.parametrize("value", [b"a\r\nset-cookie: b", b"a\nb", b"a\rb", b"\r\n"])
async def test_a_header_with_a_line_break_is_never_sent(value: bytes) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await scope["extensions"][REPLY_EXTENSION](200, [length(b""), (b"x-a", value)], b"")

    async with serve(app, http=limited_protocol(), log_level="critical") as server, connect(server) as client:
        await client.send(GET)
        reply = await client.reply()
        assert reply.status == 500
        assert "set-cookie" not in reply.headers


async def test_a_second_reply_is_refused_and_the_first_stands() -> None:
    refused: list[BaseException] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await http_reply(send, 200, b"first")
        try:
            await scope["extensions"][REPLY_EXTENSION](200, [length(b"second")], b"second")
        except RuntimeError as error:
            refused.append(error)

    async with serve(app, http=limited_protocol()) as server, connect(server) as client:
        await client.send(GET)
        assert (await client.reply()).body == b"first"
        await wait_until(lambda: refused)
        await client.send(GET)
        assert (await client.reply()).body == b"first"


async def test_a_reply_to_a_client_that_left_goes_nowhere() -> None:
    replied: list[bool] = []
    begun = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        begun.set()
        while (await receive())["type"] != "http.disconnect":
            pass
        await scope["extensions"][REPLY_EXTENSION](200, [length(b"late")], b"late")
        replied.append(True)

    async with serve(app, http=limited_protocol()) as server:
        async with connect(server) as client:
            await client.send(GET)
            await begun.wait()
        await wait_until(lambda: replied)
