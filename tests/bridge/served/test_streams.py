"""Server streams over HTTP, cancellation and slow clients, on a real server."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from google.api import httpbody_pb2

from fleet_server.bridge.replies import ReplyEncoder
from fleet_server.bridge.streams import wants_sse
from fleet_server.domain.errors import FleetError
from tests.bridge.library import check_error, pb
from tests.bridge.raw_http import connect, wait_until
from tests.bridge.served.server import Served, served

SSE = {"accept": "text/event-stream"}


def lines_of(reply: httpx.Response) -> list[Any]:
    return [json.loads(line) for line in reply.text.splitlines()]


class Feed:
    """A servicer's stream that yields what a test puts into it, and knows how it ended."""

    def __init__(self, *, first: tuple[Any, ...] = (), sure: bool = False) -> None:
        self.queue: asyncio.Queue[Any] = asyncio.Queue()
        for item in first:
            self.queue.put_nowait(item)
        self.sure = sure
        self.entered = asyncio.Event()
        self.closed = asyncio.Event()
        self.contexts: list[Any] = []

    async def __call__(self, request: Any, context: Any) -> Any:
        self.contexts.append(context)
        self.entered.set()
        try:
            if self.sure:
                await context.send_initial_metadata((("x-topic", "t"),))
            while True:
                item = await self.queue.get()
                if item is None:
                    return
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self.closed.set()


async def test_a_stream_is_one_json_object_a_line() -> None:
    async with served() as it:
        reply = await it.client.get("/v1/watch?topic=x&count=3")
        assert reply.headers["content-type"] == "application/x-ndjson"
        assert reply.headers["x-request-id"]
        assert lines_of(reply) == [{"id": str(index), "text": "x"} for index in range(3)]
        assert reply.text.endswith("}\n")
        empty = await it.client.get("/v1/watch?topic=x")
        assert (empty.status_code, empty.content) == (200, b"")


async def test_sse_has_data_and_id_and_no_event_name() -> None:
    async with served() as it:
        first = (pb.Event(id="7", text="a"), pb.Event(text="b"), pb.Event(id="x\ny", text="c"), None)
        it.library.on("Watch", Feed(first=first))
        reply = await it.client.get("/v1/watch", headers=SSE)
        assert reply.headers["content-type"] == "text/event-stream"
        assert reply.headers["cache-control"] == "no-cache"
        assert reply.text == (
            'id: 7\ndata: {"id":"7","text":"a"}\n\ndata: {"id":null,"text":"b"}\n\ndata: {"id":"x\\ny","text":"c"}\n\n'
        )


async def test_a_number_is_an_id_too_and_zero_is_not_unset() -> None:
    async with served() as it:
        text = (await it.client.get("/v1/ticks", headers=SSE)).text
        assert text == 'id: 0\ndata: {"id":0}\n\ndata: {"id":null}\n\n'


async def test_response_body_stands_in_for_each_message() -> None:
    async with served() as it:
        reply = await it.client.get("/v1/watch/text?topic=x&count=2")
        assert reply.text == '"x"\n"x"\n'


@pytest.mark.parametrize(
    ("accept", "sse"),
    [
        (None, False),
        (b"*/*", False),
        (b"application/json", False),
        (b"text/event-stream", True),
        (b"Text/Event-Stream, */*;q=0.1", True),
        (b"text/event-stream;q=0", False),
        (b"text/event-stream;q=0.5, application/x-ndjson", False),
        (b"application/x-ndjson;q=0.5, text/event-stream;q=0.6", True),
        (b"text/event-stream;q=much", False),
    ],
)
def test_accept_chooses_the_form(accept: bytes | None, sse: bool) -> None:
    assert wants_sse(accept) is sse


async def test_an_error_before_the_first_message_is_an_ordinary_reply() -> None:
    async with served() as it:
        for error, status in ((FleetError("JOB_NOT_FOUND", "none"), 404), (FleetError("NO_NODE", "none"), 503)):
            it.library.on("Watch", Feed(first=(error, error)))
            it.library.on("Download", Feed(first=(error,)))
            check_error(await it.client.get("/v1/watch"), status, error.reason)
            check_error(await it.client.get("/v1/watch", headers=SSE), status, error.reason)
            check_error(await it.client.get("/v1/download/x"), status, error.reason)


async def test_an_error_after_the_start_is_the_last_message() -> None:
    async with served() as it:
        first = (pb.Event(text="a"), FleetError("STORE_UNAVAILABLE", "the store is down"))
        it.library.on("Watch", Feed(first=first))
        reply = await it.client.get("/v1/watch")
        assert reply.status_code == 200
        message, error = lines_of(reply)
        assert message["text"] == "a"
        assert (error["reason"], error["code"]) == ("STORE_UNAVAILABLE", "UNAVAILABLE")
        assert error["request_id"] == reply.headers["x-request-id"]
        it.library.on("Watch", Feed(first=first))
        event = (await it.client.get("/v1/watch", headers=SSE)).text.split("\n\n")[1]
        assert event.startswith("event: error\ndata: {")
        assert json.loads(event.partition("data: ")[2])["reason"] == "STORE_UNAVAILABLE"


async def test_the_head_comes_when_the_servicer_is_sure_not_only_with_a_message() -> None:
    async with served(head_seconds=1000) as it:
        feed = Feed(sure=True)
        it.library.on("Watch", feed)
        async with it.client.stream("GET", "/v1/watch") as reply:
            assert (reply.status_code, reply.headers["x-topic"]) == (200, "t")
            feed.queue.put_nowait(pb.Event(text="late"))
            feed.queue.put_nowait(None)
            assert "late" in (await reply.aread()).decode()


async def test_the_head_comes_in_time_where_the_servicer_says_nothing() -> None:
    async with served(head_seconds=0.05) as it:
        feed = Feed()
        it.library.on("Watch", feed)
        async with it.client.stream("GET", "/v1/watch") as reply:
            assert reply.status_code == 200
            feed.queue.put_nowait(FleetError("JOB_NOT_FOUND", "none after all"))
            assert json.loads(await reply.aread())["reason"] == "JOB_NOT_FOUND"


async def test_sse_is_kept_warm_by_comments_and_ndjson_is_not() -> None:
    async with served(keepalive_seconds=0.02, head_seconds=0.02) as it:
        feed = Feed(sure=True)
        it.library.on("Watch", feed)
        async with it.client.stream("GET", "/v1/watch", headers=SSE) as reply:
            text = ""
            async for piece in reply.aiter_text():
                text += piece
                if text.count(": \n\n") >= 3:
                    break
            assert set(text.split("\n\n")) == {": ", ""}
        await asyncio.wait_for(feed.closed.wait(), 40)
        plain = Feed(sure=True)
        it.library.on("Watch", plain)
        async with (
            it.client.stream("GET", "/v1/watch") as reply,
            it.client.stream("GET", "/v1/watch", headers=SSE) as warm,
        ):
            async for _ in warm.aiter_text():
                break
            plain.queue.put_nowait(None)
            plain.queue.put_nowait(None)
            assert await reply.aread() == b""


@pytest.mark.parametrize("path", ["/v1/watch", "/v1/download/x"])
@pytest.mark.parametrize("begun", [False, True])
async def test_a_client_that_leaves_ends_the_stream(path: str, begun: bool) -> None:
    async with served() as it:
        message = pb.Event(text="a") if path == "/v1/watch" else httpbody_pb2.HttpBody(data=b"a")
        feed = Feed(first=(message,) if begun else ())
        it.library.on("Watch", feed)
        it.library.on("Download", feed)
        async with connect(it.server) as client:
            await client.send(f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
            await asyncio.wait_for(feed.entered.wait(), 40)
            if begun:
                await client.reader.readuntil(b"a")
        await asyncio.wait_for(feed.closed.wait(), 40)
        await wait_until(lambda: it.bridge.live_streams == 0)
        await wait_until(feed.contexts[0].done)
        assert feed.contexts[0].cancelled()


async def test_a_client_that_takes_nothing_is_let_go() -> None:
    async with served(send_seconds=0.2) as it:
        feed = Feed()
        it.library.on("Watch", feed)
        async with connect(it.server) as client:
            await client.send(b"GET /v1/watch HTTP/1.1\r\nhost: x\r\n\r\n")
            await asyncio.wait_for(feed.entered.wait(), 40)
            big = pb.Event(text="x" * 1_000_000)
            while not feed.closed.is_set():
                if feed.queue.qsize() < 4:
                    feed.queue.put_nowait(big)
                await asyncio.sleep(0)
            await wait_until(lambda: it.bridge.live_streams == 0)


async def test_bytes_come_without_delimiters_and_break_off_on_an_error() -> None:
    async with served() as it:
        reply = await it.client.get("/v1/download/x")
        assert reply.content == b"AAAABBBBCCCC"
        assert reply.headers["content-type"] == "image/png"
        assert reply.headers["transfer-encoding"] == "chunked"
        it.library.on("Download", Feed(first=(httpbody_pb2.HttpBody(data=b"A"), FleetError("S3_UNAVAILABLE", "gone"))))
        with pytest.raises(httpx.RemoteProtocolError):
            await it.client.get("/v1/download/x")


def file_of(*metadata: tuple[str, str], pieces: int = 3) -> Any:
    async def download(request: Any, context: Any) -> Any:
        await context.send_initial_metadata(metadata)
        for _ in range(pieces):
            yield httpbody_pb2.HttpBody(content_type="image/png", data=b"1234")

    return download


async def test_a_known_length_a_part_and_an_unchanged_file() -> None:
    async with served() as it:
        part = (("content-length", "12"), ("x-http-status", "206"), ("content-range", "bytes 0-11/99"))
        it.library.on("Download", file_of(*part))
        reply = await it.client.get("/v1/download/x")
        assert (reply.status_code, reply.content) == (206, b"1234" * 3)
        assert (reply.headers["content-length"], reply.headers["content-range"]) == ("12", "bytes 0-11/99")
        assert "transfer-encoding" not in reply.headers
        for pieces in (0, 1):
            same = (("content-length", "12"), ("x-http-status", "304"), ("etag", '"1"'))
            it.library.on("Download", file_of(*same, pieces=pieces))
            reply = await it.client.get("/v1/download/x")
            assert (reply.status_code, reply.content, reply.headers["etag"]) == (304, b"", '"1"')
            assert "content-length" not in reply.headers
        it.library.on("Download", file_of(pieces=0))
        reply = await it.client.get("/v1/download/x")
        assert (reply.status_code, reply.headers["content-length"]) == (200, "0")


async def test_head_of_a_stream_has_the_head_and_ends_it() -> None:
    async with served() as it:
        endless = Feed(first=tuple(httpbody_pb2.HttpBody(content_type="image/png", data=b"1") for _ in range(3)))
        it.library.on("Download", endless)
        reply = await it.client.head("/v1/download/x")
        assert (reply.status_code, reply.headers["content-type"], reply.content) == (200, "image/png", b"")
        await asyncio.wait_for(endless.closed.wait(), 40)
        it.library.on("Download", file_of(("content-length", "12")))
        assert (await it.client.head("/v1/download/x")).headers["content-length"] == "12"
    async with served(head_seconds=0.05) as it:
        for feed in (Feed(), Feed(sure=True), Feed(first=(pb.Event(text="a"),))):
            it.library.on("Watch", feed)
            reply = await it.client.head("/v1/watch")
            assert (reply.status_code, reply.headers["content-type"]) == (200, "application/x-ndjson")
            await asyncio.wait_for(feed.closed.wait(), 40)
        assert (await it.client.get("/v1/books/7")).status_code == 200  # the connection is still in step


async def test_a_shutdown_is_the_last_message_and_nothing_new_begins() -> None:
    async with served() as it:
        feed = Feed(first=(pb.Event(text="a"),))
        it.library.on("Watch", feed)
        async with it.client.stream("GET", "/v1/watch") as reply:
            lines = reply.aiter_lines()
            assert json.loads(await anext(lines))["text"] == "a"
            stopping = asyncio.create_task(it.bridge.shut_down())
            assert json.loads(await anext(lines))["reason"] == "SHUTTING_DOWN"
            assert [line async for line in lines] == []
            await stopping
        assert feed.closed.is_set()
        check_error(await it.client.get("/v1/watch"), 503, "SHUTTING_DOWN")
        assert (await it.client.get("/v1/books/7")).status_code == 200


async def test_an_object_that_many_streams_yield_is_encoded_once_where_the_type_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoded: list[Any] = []
    plain = ReplyEncoder._json

    def counted(self: ReplyEncoder, reply: Any) -> bytes:
        encoded.append(reply)
        return plain(self, reply)

    monkeypatch.setattr(ReplyEncoder, "_json", counted)
    event = pb.Event(id="1", text="shared")

    async def shared(request: Any, context: Any) -> Any:
        yield event
        event.text += "!"
        yield event

    for names, texts, times in (
        (frozenset[str](), ["shared", "shared!", "shared!", "shared!!"], 4),
        (frozenset({"transcode.test.v1.Event"}), ["shared"] * 4, 1),
    ):
        event.text = "shared"
        encoded.clear()
        async with served(shared_messages=names) as it:
            it.library.on("Watch", shared)
            seen = [line["text"] for _ in range(2) for line in lines_of(await it.client.get("/v1/watch"))]
            assert (seen, len(encoded)) == (texts, times)


async def leave_while_it_waits(it: Served, path: str) -> None:
    async with connect(it.server) as client:
        await client.send(f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n".encode())
        await asyncio.wait_for(it.library.entered.wait(), 40)


async def test_a_caller_who_leaves_cancels_just_the_calls_that_say_so() -> None:
    async with served() as it:
        await leave_while_it_waits(it, "/v1/wait")
        await asyncio.wait_for(it.library.cancelled.wait(), 40)
        await wait_until(lambda: it.library.ended == [True])
    async with served() as it:
        await leave_while_it_waits(it, "/v1/steady")
        await wait_until(lambda: not it.server.server_state.connections)
        assert not it.library.cancelled.is_set()
        it.library.release.set()
        await wait_until(lambda: it.library.ended == [False])


async def test_a_call_that_watches_its_caller_answers_like_any_other() -> None:
    async with served() as it:
        it.library.release.set()
        reply = await it.client.post("/v1/wait", json={"name": "x"})
        assert reply.json()["name"] == "x"
        await wait_until(lambda: it.library.ended == [False])
        check_error(await it.client.post("/v1/wait", json={"nothing": "x"}), 400, "UNKNOWN_FIELD")


async def test_a_call_that_watches_its_caller_gets_a_body_that_comes_late() -> None:
    async with served() as it:
        it.library.release.set()
        async with connect(it.server) as client:
            head = b"POST /v1/wait HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 12\r\n\r\n"
            await client.send(head + b'{"na')
            await wait_until(lambda: it.server.server_state.tasks)
            await client.send(b'me":"x"}')
            reply = await client.reply()
            assert (reply.status, reply.json()["name"]) == (200, "x")


async def test_a_body_that_trickles_is_408_over_tcp() -> None:
    async with served(body_chunk_seconds=0.1) as it:
        async with connect(it.server) as client:
            head = b"POST /v1/books HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n"
            await client.send(head + b"{")
            reply = await client.reply()
            assert (reply.status, reply.json()["reason"]) == (408, "REQUEST_TIMEOUT")
            assert reply.headers["connection"] == "close"
        assert it.library.requests == []
