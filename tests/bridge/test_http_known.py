"""Header sections that come again: recognized or not, an answer is the one that the parser's way gives."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fleet_server.bridge.asgi import HEAD_EXTENSION
from fleet_server.bridge.context import InProcContext
from fleet_server.bridge.guard import HostOriginGuard
from fleet_server.bridge.http_known import KnownHead, KnownHeads
from fleet_server.bridge.http_limits import limited_protocol
from tests.bridge.library import Library, bridge_of
from tests.bridge.raw_http import connect, serve

FIELDS = b"Host: localhost\r\nX-One: 1\r\n"


async def told(scope: Any, receive: Any, send: Any) -> None:
    """Answers with what came, and whether its header section was known."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    names = ("method", "path", "http_version")
    headers = [[name.decode(), value.decode()] for name, value in scope["headers"]]
    scope["headers"].append((b"x-left", b"behind"))
    said = {name: scope[name] for name in names}
    said |= {"raw": scope["raw_path"].decode(), "query": scope["query_string"].decode(), "body": body.decode()}
    said |= {"headers": headers, "known": HEAD_EXTENSION in scope["extensions"]}
    text = json.dumps(said).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(text))]})
    await send({"type": "http.response.body", "body": text})


def request(line: bytes, fields: bytes = FIELDS, body: bytes = b"") -> bytes:
    length = b"Content-Length: %d\r\n" % len(body) if body else b""
    return line + b" HTTP/1.1\r\n" + fields + length + b"\r\n" + body


PLAIN = [
    request(b"GET /a"),
    request(b"GET /b/c?x=1&y=%20"),
    request(b"DELETE /d%C3%A9"),
    request(b"POST /e", body=b"one"),
    request(b"PUT /f", body=b"two"),
    request(b"POST /e", body=b"tre"),
    request(b"GET /a", b"Host: localhost\r\nX-One: 2\r\nX-One:  2 \r\nConnection: keep-alive\r\n"),
]


async def test_what_is_recognized_says_the_same_as_what_was_parsed() -> None:
    async with serve(told, http=limited_protocol()) as server, connect(server) as client:
        first: dict[bytes, Any] = {}
        for data in PLAIN:
            async with connect(server) as fresh:
                await fresh.send(data)
                first[data] = (await fresh.reply()).json()
            assert not first[data].pop("known")
        for turn in range(3):
            for data in PLAIN:
                await client.send(data)
                said = (await client.reply()).json()
                assert said.pop("known") or turn == 0
                assert said == first[data]


SECTION = request(b"GET /a")
LENGTH = request(b"POST /a", body=b"abc")


@pytest.mark.parametrize(
    ("learnt", "data"),
    [
        pytest.param(SECTION, SECTION[:-1], id="not whole"),
        pytest.param(SECTION, SECTION * 2, id="two of them"),
        pytest.param(SECTION, SECTION + b"x", id="more than that"),
        pytest.param(LENGTH, LENGTH[:-1], id="body not whole"),
        pytest.param(SECTION, SECTION.replace(b"1.1", b"1.0"), id="HTTP/1.0"),
        pytest.param(SECTION, SECTION.replace(b"/a", b"a"), id="no path"),
        pytest.param(SECTION, SECTION.replace(b"/a", b"/a#b"), id="fragment"),
        pytest.param(SECTION, SECTION.replace(b"/a", b"/\xc3\xa9"), id="not ASCII"),
        pytest.param(SECTION, SECTION.replace(b"GET ", b"GET  "), id="two spaces"),
        pytest.param(SECTION, SECTION.replace(b"/a", b"/" + b"a" * (202 - len(SECTION))), id="a byte too long"),
        pytest.param(SECTION, SECTION.replace(b"GET", b"CONNECT"), id="another kind of method"),
        pytest.param(SECTION, b"\r\n" + SECTION, id="empty line first"),
        pytest.param(SECTION, SECTION.replace(b"One", b"one"), id="another spelling"),
    ],
)
def test_only_whole_plain_requests_are_recognized(learnt: bytes, data: bytes) -> None:
    known = KnownHeads(200)
    length = [(b"content-length", b"3")] if learnt is LENGTH else []
    known.learn(learnt, [(b"host", b"localhost"), (b"x-one", b"1"), *length])
    assert known.recognize(learnt) is not None
    assert known.recognize(SECTION.replace(b"/a", b"/" + b"a" * (201 - len(SECTION)))) is not None or learnt is LENGTH
    assert known.recognize(data) is None


@pytest.mark.parametrize(
    ("section", "headers"),
    [
        (b"Connection: close", [(b"connection", b"close")]),
        (b"Connection: upgrade", [(b"connection", b"upgrade")]),
        (b"Proxy-Connection: x", [(b"proxy-connection", b"x")]),
        (b"Transfer-Encoding: chunked", [(b"transfer-encoding", b"chunked")]),
        (b"Expect: 100-continue", [(b"expect", b"100-continue")]),
        (b"Upgrade: x", [(b"upgrade", b"x")]),
        (b"Content-Length: +3", [(b"content-length", b"+3")]),
        (b"A: 1\n\nGET /b HTTP/1.1", [(b"a", b"1")]),
        (b"A: 1\r\n b", [(b"a", b"1 b")]),
        (b"A: " + b"1" * 4096, [(b"a", b"1" * 4096)]),
    ],
)
def test_sections_that_say_more_are_not_kept(section: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    known = KnownHeads(16384)
    data = b"GET /a HTTP/1.1\r\n" + section + b"\r\n\r\n"
    known.learn(data, headers)
    assert known.recognize(data) is None


def test_not_all_sections_are_kept() -> None:
    known = KnownHeads(16384)
    requests = [b"GET / HTTP/1.1\r\nA: %d\r\n\r\n" % number for number in range(2000)]
    for number, data in enumerate(requests):
        known.learn(data, [(b"a", b"%d" % number)])
    assert sum(known.recognize(data) is not None for data in requests) <= 256
    assert known.recognize(requests[-1]) is not None


@pytest.mark.parametrize(("target", "kept"), [(b"/%d", 256), (b"/" + b"a" * 512 + b"%d", 0)], ids=["short", "long"])
def test_not_all_lines_are_kept(target: bytes, kept: int) -> None:
    known = KnownHeads(16384)
    known.learn(SECTION, [(b"host", b"localhost"), (b"x-one", b"1")])
    requests = [request(b"GET " + target % number) for number in range(600)]
    lines = [known.recognize(data) for data in requests]
    again = known.recognize(requests[-1])
    assert again is not None
    assert (again[0] is lines[-1][0] if lines[-1] else None) == bool(kept)
    assert len(known._lines) <= kept


async def test_a_known_line_is_answered_as_at_first() -> None:
    asked = {
        b"GET /v1/books/7": 200,
        b"GET /v1/books/8": 200,
        b"DELETE /v1/books/7": 200,
        b"GET /v1/books/%2F": 400,
        b"GET /v1/nowhere": 404,
        b"POST /v1/titles": 405,
        b"GET /v1/titles": 200,
    }
    fields = FIELDS + b"X-Request-Id: one\r\n"
    async with serve(bridge_of(Library()), http=limited_protocol()) as server, connect(server) as client:
        first: dict[bytes, bytes] = {}
        for line, status in asked.items():
            async with connect(server) as fresh:
                await fresh.send(request(line, fields))
                reply = await fresh.reply()
            assert reply.status == status, line
            first[line] = reply.body
        for line, status in [*asked.items()] * 3:
            await client.send(request(line, fields))
            reply = await client.reply()
            assert (reply.status, reply.body) == (status, first[line])


def test_the_metadata_of_a_known_section_is_that_of_its_headers() -> None:
    headers = [(b"x-api-key", b"k"), (b"grpc-metadata-a", b"1"), (b"grpc-metadata-a", b"2"), (b"host", b"h")]
    extensions = {HEAD_EXTENSION: KnownHead(headers, 0)}
    for request_id in ("one", "two"):
        parsed = InProcContext({"headers": headers}, request_id, None).text_metadata()
        known = InProcContext({"headers": headers, "extensions": extensions}, request_id, None).text_metadata()
        assert known == parsed
        known.clear()


async def test_a_known_section_opens_no_door_for_another() -> None:
    async with (
        serve(HostOriginGuard(told), http=limited_protocol()) as server,
        connect(server) as client,
        connect(server) as stranger,
    ):
        for fields, status in ((b"Host: localhost\r\n", 200), (b"Host: evil.example\r\n", 403)) * 3:
            await client.send(request(b"GET /", fields))
            assert (await client.reply()).status == status
            # A page of another site may be navigated to, and may not call.
            page = b"Host: localhost\r\nSec-Fetch-Site: cross-site\r\n"
            walk = page + b"Sec-Fetch-Mode: navigate\r\nSec-Fetch-Dest: document\r\n"
            for line, asked, expected in ((b"GET /", walk, 200), (b"POST /", walk, 403), (b"GET /", page, 403)):
                await stranger.send(request(line, asked))
                assert (await stranger.reply()).status == expected
