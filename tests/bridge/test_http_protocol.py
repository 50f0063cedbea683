"""A connection's one task and one idle timer, from a raw socket on a real uvicorn."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable, Coroutine
from typing import Any
from unittest.mock import MagicMock

import pytest
import uvicorn
from uvicorn.server import ServerState

from fleet_server.bridge.asgi import REPLY_EXTENSION
from fleet_server.bridge.http_limits import limited_protocol
from tests.bridge.raw_http import connect, serve, wait_until

GET = b"GET /g HTTP/1.1\r\nhost: a\r\n\r\n"


class Tasks:
    """Answers with the name of the task that it runs in; `/held` goes on after its reply until it is let go."""

    def __init__(self) -> None:
        self.let_go = asyncio.Event()
        self.tasks: list[asyncio.Task[Any]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.tasks.append(task)
        body = task.get_name().encode()
        await scope["extensions"][REPLY_EXTENSION](200, [(b"content-length", b"%d" % len(body))], body)
        if scope["path"] == "/held":
            await self.let_go.wait()


async def test_the_requests_of_a_connection_run_in_one_task_that_ends_with_it() -> None:
    app = Tasks()
    async with serve(app, http=limited_protocol()) as server:
        async with connect(server) as client, connect(server) as other:
            names = []
            for _ in range(3):
                await client.send(GET)
                names.append((await client.reply()).body)
            await other.send(GET)
            assert names == [names[0]] * 3
            assert (await other.reply()).body != names[0]
        await wait_until(lambda: all(task.done() for task in app.tasks))
        assert not any(task.cancelled() for task in app.tasks)
        assert not server.server_state.tasks


async def test_a_request_leaves_nothing_to_the_garbage_collector() -> None:
    left: list[weakref.ref[Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        reply = scope["extensions"][REPLY_EXTENSION]
        left.append(weakref.ref(reply.__self__))
        await reply(200, [(b"content-length", b"0")], b"")

    async with serve(app, http=limited_protocol()) as server, connect(server) as client:
        gc.disable()
        try:
            for _ in range(3):
                await client.send(GET)
                assert (await client.reply()).status == 200
            await wait_until(lambda: left[0]() is None)
        finally:
            gc.enable()


async def test_a_request_does_not_wait_for_what_the_last_one_does_after_its_reply() -> None:
    app = Tasks()
    async with serve(app, http=limited_protocol()) as server, connect(server) as client:
        await client.send(GET.replace(b"/g", b"/held"))
        held = (await client.reply()).body
        for _ in range(2):
            await client.send(GET)
            assert (await client.reply()).body != held
        app.let_go.set()
        await wait_until(lambda: len({task for task in app.tasks if not task.done()}) == 1)
        await client.send(GET)
        assert (await client.reply()).status == 200


async def test_pipelined_requests_come_one_after_the_other() -> None:
    app = Tasks()
    async with serve(app, http=limited_protocol()) as server, connect(server) as client:
        await client.send(GET * 5)
        assert [(await client.reply()).status for _ in range(5)] == [200] * 5
        await client.send(GET)
        assert (await client.reply()).status == 200


class Clock:
    """The loop of a protocol, with a clock that stands still and timers that go off when they are told to."""

    def __init__(self) -> None:
        self.now = 100.0
        self.timers: list[tuple[float, Callable[[], None]]] = []

    def time(self) -> float:
        return self.now

    def call_later(self, seconds: float, call: Callable[[], None]) -> asyncio.TimerHandle:
        self.timers.append((seconds, call))
        return asyncio.TimerHandle(0, call, (), asyncio.get_running_loop())

    def create_task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        return asyncio.get_running_loop().create_task(work)

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.get_running_loop().create_future()


async def test_a_connection_is_closed_once_it_was_idle_for_the_whole_time() -> None:
    config = uvicorn.Config(Tasks(), http=limited_protocol(), lifespan="off", timeout_keep_alive=10)
    config.load()
    clock, transport = Clock(), MagicMock(spec=asyncio.Transport)
    transport.is_closing.return_value = False
    protocol = limited_protocol()(config, ServerState(), {}, clock)
    protocol.connection_made(transport)
    clock.timers.clear()  # that of the first header

    async def one_request() -> None:
        written = transport.write.call_count
        protocol.data_received(GET)
        await wait_until(lambda: transport.write.call_count > written)

    await one_request()
    [(seconds, look)] = clock.timers
    assert seconds == 10
    clock.now += 6
    await one_request()
    assert len(clock.timers) == 1
    clock.now += 4
    look()  # ten seconds after the first reply, four after the second
    transport.close.assert_not_called()
    assert clock.timers[1:] == [(6, look)]
    protocol.data_received(GET[:5])
    clock.now += 6
    look()  # a request is on its way: its header has a clock of its own
    transport.close.assert_not_called()
    written = transport.write.call_count
    protocol.data_received(GET[5:])
    await wait_until(lambda: transport.write.call_count > written)
    clock.now += 10
    clock.timers[-1][1]()
    transport.close.assert_called_once()
    protocol.connection_lost(None)


@pytest.mark.parametrize(
    ("target", "raw_path", "path", "query"),
    [
        ("/a%20b?x=1&y=?", "/a%20b", "/a b", "x=1&y=?"),
        ("/a?", "/a", "/a", ""),
        ("//h/a", "//h/a", "//h/a", ""),
        ("/a#f?x", "/a", "/a", ""),
        ("http://h:1/a%2Fb?x", "/a%2Fb", "/a/b", "x"),
    ],
)
async def test_the_target_is_split_into_path_and_query(target: str, raw_path: str, path: str, query: str) -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((scope["raw_path"].decode(), scope["path"], scope["query_string"].decode()))
        await scope["extensions"][REPLY_EXTENSION](200, [(b"content-length", b"0")], b"")

    async with serve(app, http=limited_protocol()) as server, connect(server) as client:
        await client.send(GET.replace(b"/g", target.encode()))
        assert (await client.reply()).status == 200
    assert seen == [(raw_path, path, query)]


async def test_the_state_of_one_request_is_not_that_of_another() -> None:
    states: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        states.append(dict(scope["state"]))
        scope["state"]["seen"] = True
        await scope["extensions"][REPLY_EXTENSION](200, [(b"content-length", b"0")], b"")

    async with serve(app, http=limited_protocol()) as server, connect(server) as client:
        for _ in range(2):
            await client.send(GET)
            await client.reply()
    assert states == [{}, {}]
