"""uvicorn's HTTP/1.1 protocol with less work for each request.

uvicorn makes a task, an event and a timer for every request. Here a connection has one task, which serves its requests
one after the other, and one timer, which looks whether it has been idle for too long; events are made where somebody
waits. The rest (parsing, streams, upgrades, flow control) is uvicorn's.
"""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import unquote

import httptools
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from fleet_server.bridge.asgi import (
    ABORT_EXTENSION,
    BODY_EXTENSION,
    HEAD_EXTENSION,
    LINE_EXTENSION,
    REPLY_EXTENSION,
    Scope,
)
from fleet_server.bridge.errors import Header
from fleet_server.bridge.http_exchange import Connection, HttpExchange
from fleet_server.bridge.http_known import KnownHead, KnownLine

_HASH = ord("#")


class LeanHttpProtocol(HttpToolsProtocol):
    """The base of `LimitedHttpProtocol`, whose callbacks call the parts of a request's life that stand here.

    Requests of one connection share a task and so its context variables: what one sets, a later one sees. There is no
    access log, and `limit_concurrency` does not count.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._connection: Connection
        self._same: dict[str, Any]  # of each request's scope
        self._raw_root = b""
        self._active: RequestResponseCycle | None = None  # the request that is being answered
        self._idle: asyncio.Future[RequestResponseCycle | None] | None = None  # what the connection's task waits for
        self._idle_since: float | None = None
        self._idle_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._connection = Connection(transport, self.close_after_reply)
        self._same = {
            "type": "http",
            "asgi": {"version": self.asgi_version, "spec_version": "2.3"},
            "server": self.server,
            "client": self.client,
            "scheme": self.scheme,
            "root_path": self.root_path,
            # Of each request; here, so that the copies have their places already.
            "http_version": "1.1",
            **dict.fromkeys(("method", "headers", "state")),
            **dict.fromkeys(("path", "raw_path", "query_string", "extensions")),
        }
        self._raw_root = self.root_path.encode("ascii")

    def connection_lost(self, exc: Exception | None) -> None:
        self._release()
        super().connection_lost(exc)

    def handle_websocket_upgrade(self) -> None:
        self._release()
        super().handle_websocket_upgrade()

    def close_after_reply(self) -> None:
        """Ends the connection once all that was written is out."""
        self.transport.close()

    # A request, as its parts come.

    def _open_request(self) -> None:
        """The header section has ended: starts the request, or puts it behind those before it."""
        parser = self.parser
        version = parser.get_http_version()
        scope = self._new_scope(parser.get_method().decode("ascii"), self.headers)
        scope["http_version"] = version
        if parser.should_upgrade() and self._should_upgrade():
            return
        raw_path, query = _split(self.url)
        path = raw_path.decode("ascii")
        scope["path"] = self.root_path + (unquote(path) if "%" in path else path)
        scope["raw_path"] = self._raw_root + raw_path
        scope["query_string"] = query
        keep_alive = version != "1.0" and parser.should_keep_alive()
        self._open(scope, {}, keep_alive, bytearray(), True)

    def _open_known(self, line: KnownLine, head: KnownHead, body: bytes) -> None:
        """A plain request has come as a whole, with a header section that is known: starts it."""
        self.expect_100_continue = False
        scope = self._new_scope(line.method, head.headers.copy())
        scope["path"] = self.root_path + line.path
        scope["raw_path"] = self._raw_root + line.raw_path
        scope["query_string"] = line.query
        self._open(scope, {LINE_EXTENSION: line, HEAD_EXTENSION: head}, True, body, False)
        if len(body) > HIGH_WATER_LIMIT:
            self.flow.pause_reading()

    def _new_scope(self, method: str, headers: list[Header]) -> Scope:
        scope: Scope = self._same.copy()
        scope["method"] = method
        scope["headers"] = headers
        scope["state"] = self.app_state.copy()
        self.scope = scope  # type: ignore[assignment]
        return scope

    def _open(
        self, scope: Scope, extensions: dict[str, Any], keep_alive: bool, body: bytes | bytearray, more_body: bool
    ) -> None:
        """Starts a request, or puts it behind those before it."""
        exchange = HttpExchange(
            scope,
            self._connection,
            self.flow,
            self.server_state.default_headers,
            self.expect_100_continue,
            keep_alive,
            self.on_response_complete,
            body,
            more_body,
        )
        extensions[ABORT_EXTENSION] = self.transport.abort
        extensions[REPLY_EXTENSION] = exchange.reply
        extensions[BODY_EXTENSION] = exchange.take_body
        scope["extensions"] = extensions
        before, self.cycle = self.cycle, exchange
        if before is None or before.response_complete:
            self._start_asgi_task(exchange, self.app)
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((exchange, self.app))

    def _take_in(self, piece: bytes) -> None:
        """A piece of the body has come."""
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            cycle.body += piece
            if len(cycle.body) > HIGH_WATER_LIMIT:
                self.flow.pause_reading()
            cycle.message_event.set()

    def _end_request(self) -> None:
        """All of the body has come."""
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            cycle.more_body = False
            cycle.message_event.set()

    # The connection's task.

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._active = cycle
        if self._idle is not None:
            self._idle.set_result(cycle)
            self._idle = None
            return
        # The first request, or one that came while the work on the last one goes on after its reply.
        task = self.loop.create_task(self._serve(cycle, app))
        task.add_done_callback(self.tasks.discard)
        self.tasks.add(task)

    async def _serve(self, first: RequestResponseCycle, app: ASGI3Application) -> None:
        cycle: RequestResponseCycle | None = first
        task = asyncio.current_task()
        while cycle is not None:
            await cycle.run_asgi(app)
            # The scope and what the bridge finds in it hold each other: parted here, both go at once.
            cycle.scope["extensions"] = {}
            if self._idle is not None or self.parser is None or (task is not None and task.cancelling()):
                return  # another one waits, or nothing more will come
            self._idle = self.loop.create_future()
            cycle = await self._idle

    def _release(self) -> None:
        """Lets the task go."""
        if self._idle is not None:
            self._idle.set_result(None)
            self._idle = None

    # Idle connections.

    def _go_on(self) -> None:
        """A reply is out: starts the next request that waits, or the time that the connection may be idle."""
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
            return
        self._idle_since = self.loop.time()
        if self._idle_timer is None:
            self._idle_timer = self.loop.call_later(self.timeout_keep_alive, self._look_whether_idle)

    def _unset_keepalive_if_required(self) -> None:
        self._idle_since = None

    def _look_whether_idle(self) -> None:
        self._idle_timer = None
        if self._idle_since is None:
            return  # the next reply starts the timer again
        left = self._idle_since + self.timeout_keep_alive - self.loop.time()
        if left <= 0:
            self.timeout_keep_alive_handler()
        else:
            self._idle_timer = self.loop.call_later(left, self._look_whether_idle)


def _split(target: bytes) -> tuple[bytes, bytes]:
    """Path and query of a request target."""
    if target[:1] == b"/" and _HASH not in target:
        path, _, query = target.partition(b"?")
        return path, query
    url = httptools.parse_url(target)
    return url.path, url.query or b""
