"""The HTTP server: uvicorn in our own event loop, on sockets that we have bound."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator, Sequence
from typing import Any

import uvicorn

from fleet_server.bridge.http_limits import LimitedWebSocketProtocol, limited_protocol

_BACKLOG = 2048
_MAX_FRAME_BYTES = 1 << 20
IDLE_SECONDS = 75
"""How long a connection may be idle. Clients that keep theirs for 5 s (httpx, and so our own), 15 s or 60 s (proxies)
close first: one that we close in the moment of its next request fails that request."""


class PortTakenError(RuntimeError):
    """Something else listens on the port."""


def bind(host: str, port: int, flag: str) -> list[socket.socket]:
    """Listening sockets on `host`; of loopback both families, so that `localhost` finds us either way.

    Raises PortTakenError naming the port and the flag that moves it.
    """
    first = _socket(host, port, flag)
    sockets = [first]
    if host == "127.0.0.1" and socket.has_ipv6:
        with contextlib.suppress(PortTakenError):
            sockets.append(_socket("::1", first.getsockname()[1], flag))
    return sockets


def _socket(host: str, port: int, flag: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise PortTakenError(
            f"{host}:{port} cannot be listened on ({error.strerror}): "
            f"stop what uses it, or give another port with --{flag} (FLEET_{flag.upper().replace('-', '_')})"
        ) from error
    return listener


class _Server(uvicorn.Server):
    """uvicorn without signal handlers of its own (the process has one owner of signals), telling when it is up."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.up.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpServer:
    """Serves an ASGI app until `stop`. `run` is a task of the caller's group."""

    def __init__(self, app: Any, sockets: Sequence[socket.socket], grace_seconds: float) -> None:
        config = uvicorn.Config(
            app,
            http=limited_protocol(),
            ws=LimitedWebSocketProtocol,
            ws_max_size=_MAX_FRAME_BYTES,
            lifespan="off",
            proxy_headers=False,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=IDLE_SECONDS,
            timeout_graceful_shutdown=max(1, round(grace_seconds)),
        )
        self._server = _Server(config)
        self._sockets = list(sockets)

    @property
    def port(self) -> int:
        """The port that we listen on."""
        port: int = self._sockets[0].getsockname()[1]
        return port

    async def run(self) -> None:
        """Serves; returns after `stop`, once the requests under way have been answered."""
        await self._server.serve(sockets=self._sockets)

    async def started(self) -> None:
        """Waits until connections are taken."""
        await self._server.up.wait()

    def stop(self) -> None:
        """Ends `run`."""
        self._server.should_exit = True
