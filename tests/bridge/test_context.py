"""The in-process context against the contract of grpc.aio, and the same servicer behind a real gRPC server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.message_factory import GetMessageClass

from fleet_server.bridge import BridgeSettings, InProcContext, body
from fleet_server.bridge.body import body_chunks
from fleet_server.domain.errors import FleetError
from tests.bridge.library import SERVICE, Library, bridge_of, client_of, pb


def context_of(client: Any = ("127.0.0.1", 4711), timeout: float | None = None) -> InProcContext:
    return InProcContext({"headers": [], "client": client}, "r", timeout)


def test_the_text_at_hand_is_that_of_the_pairs() -> None:
    given = [
        (b"x-api-key", b"first"),
        (b"x-api-key", b"second"),
        (b"grpc-metadata-x-api-key", b"forged"),
        (b"grpc-metadata-fleet-transport", b"grpc"),
        (b"grpc-metadata-tag", b"\xe9"),
        (b"grpc-metadata-tag", b"later"),
        (b"grpc-metadata-blob-bin", b"aGk="),
        (b"x-request-id", b"of the header"),
        (b"cookie", b"kept back"),
    ]
    context = InProcContext({"headers": given}, "r", None)
    pairs = [(key, value) for key, value in context.invocation_metadata() if isinstance(value, str)]
    assert context.text_metadata() == dict(reversed(pairs))
    assert context.text_metadata() == {"fleet-transport": "rest", "x-request-id": "r", "x-api-key": "first", "tag": "é"}


@pytest.mark.parametrize(
    ("client", "peer"),
    [(("127.0.0.1", 1), "ipv4:127.0.0.1:1"), (("::1", 1), "ipv6:[::1]:1"), (None, "unix:")],
)
def test_the_peer_is_written_as_grpc_writes_it(client: Any, peer: str) -> None:
    assert context_of(client).peer() == peer


def test_done_callbacks_run_once_at_the_end_and_late_ones_at_once() -> None:
    context = context_of()
    seen: list[Any] = []
    context.add_done_callback(seen.append)
    assert not context.done()
    context.finish(cancelled=True)
    context.add_done_callback(seen.append)
    assert seen == [context, context]
    assert context.done()
    assert context.cancelled()


async def test_initial_metadata_is_sent_once() -> None:
    context = context_of()
    await context.send_initial_metadata((("a", "b"),))
    with pytest.raises(grpc.aio.UsageError):
        await context.send_initial_metadata(())
    assert context.initial_metadata == (("a", "b"),)


async def test_read_and_write_say_what_to_do_instead() -> None:
    with pytest.raises(grpc.aio.UsageError, match="iterate"):
        await context_of().read()
    with pytest.raises(grpc.aio.UsageError, match="generator"):
        await context_of().write(pb.Empty())


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"),
        (grpc.StatusCode.UNIMPLEMENTED, "NOT_IMPLEMENTED"),
        (grpc.StatusCode.OK, "INTERNAL"),
        (grpc.StatusCode.ABORTED, "ABORTED"),
    ],
)
async def test_abort_raises_the_error_of_its_code(status: grpc.StatusCode, reason: str) -> None:
    context = context_of()
    with pytest.raises(FleetError) as caught:
        await context.abort(status, "why", (("grpc-status-details-bin", b"\xff\xff"), ("x", "y")))
    assert (caught.value.reason, caught.value.detail) == (reason, "why")
    assert context.code() is status


def test_time_remaining_falls_to_zero_and_is_none_without_a_deadline() -> None:
    assert context_of().time_remaining() is None
    assert context_of(timeout=0).time_remaining() == 0


async def test_a_body_must_keep_a_pace_even_if_each_piece_is_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now, sent = 0.0, 0

    async def receive() -> dict[str, Any]:
        nonlocal now, sent
        await asyncio.sleep(0)
        now += 4
        sent += 1
        assert sent < 50
        return {"type": "http.request", "body": b"x", "more_body": True}

    # A clock of its own: here a piece takes four seconds.
    clock = SimpleNamespace(time=lambda: now)
    times = SimpleNamespace(
        get_running_loop=lambda: clock, timeout_at=lambda when: asyncio.timeout(0 if when <= now else None)
    )
    monkeypatch.setattr(body, "asyncio", times)
    settings = BridgeSettings(body_chunk_seconds=10, body_min_bytes_per_second=1000)
    with pytest.raises(FleetError) as caught:
        async for _ in body_chunks(receive, 10_000_000, settings):
            pass
    assert caught.value.reason == "REQUEST_TIMEOUT"
    assert sent == 3


async def test_a_caller_who_leaves_in_the_middle_of_a_body_is_client_closed() -> None:
    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    with pytest.raises(FleetError) as caught:
        async for _ in body_chunks(receive, 10, BridgeSettings()):
            pass
    assert caught.value.reason == "CLIENT_CLOSED"


def handlers_of(library: Library) -> grpc.GenericRpcHandler:
    """The library as grpc.aio serves it."""
    handlers = {}
    for method in SERVICE.methods:
        serve = getattr(library, method.name, None)
        if serve is None:
            continue
        kind = f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
        handlers[method.name] = getattr(grpc, f"{kind}_rpc_method_handler")(
            serve, GetMessageClass(method.input_type).FromString, lambda message: message.SerializeToString()
        )
    return grpc.method_handlers_generic_handler(SERVICE.full_name, handlers)


async def test_one_servicer_answers_alike_over_grpc_and_http() -> None:
    library = Library()
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((handlers_of(library),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()

    def path(name: str) -> str:
        return f"/{SERVICE.full_name}/{name}"

    async def messages() -> AsyncIterator[Any]:
        for text in ("a", "b"):
            yield pb.ChatMessage(text=text)

    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel, client_of(bridge_of(library)) as client:
            get: Any = channel.unary_unary(path("GetBook"), pb.GetBookRequest.SerializeToString, pb.Book.FromString)
            book = await get(pb.GetBookRequest(book_id="7", full=True), timeout=60)
            assert (await client.get("/v1/books/7?full=true")).json()["title"] == book.title == "full"
            watch: Any = channel.unary_stream(path("Watch"), pb.WatchRequest.SerializeToString, pb.Event.FromString)
            events = [event.id async for event in watch(pb.WatchRequest(count=3), timeout=60)]
            lines = (await client.get("/v1/watch?count=3")).text.splitlines()
            assert [json.loads(line)["id"] for line in lines] == events == ["0", "1", "2"]
            chat: Any = channel.stream_stream(path("Chat"), pb.ChatMessage.SerializeToString, pb.ChatMessage.FromString)
            assert [reply.text async for reply in chat(messages(), timeout=60)] == ["a", "b"]
    finally:
        await server.stop(None)
