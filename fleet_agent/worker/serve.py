"""Runs a worker in this process until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Iterator

import uvicorn

from fleet_agent.logs import configure
from fleet_agent.settings import AgentSettings
from fleet_agent.worker.app import worker_app
from fleet_agent.worker.painter import Painter


def serve(
    settings: AgentSettings, host: str, port: int, path: str, timeout_seconds: float, *, ready_json: bool = False
) -> int:
    """The exit code: 0 after a stop, 3 where it cannot listen."""
    configure(settings.log_level)
    try:
        listener = _listening(host, port)
    except OSError as error:
        sys.stderr.write(f"{host}:{port}: {error.strerror}: give another with --port\n")
        return 3
    painter = Painter(settings, seconds=timeout_seconds)
    config = uvicorn.Config(
        worker_app(painter, path), log_level="warning", http="httptools", server_header=False, access_log=False
    )
    return asyncio.run(_serve(_Server(config, ready_json), listener))


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=128)
    # (asyncio sets it only on sockets that name their protocol.)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


class _Server(uvicorn.Server):
    """Says once that it listens."""

    def __init__(self, config: uvicorn.Config, ready_json: bool) -> None:
        super().__init__(config)
        self._ready_json = ready_json

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.started or not sockets:
            return
        host, port = sockets[0].getsockname()[:2]
        ready = {"status": "ready", "url": f"http://{host}:{port}", "pid": os.getpid()}
        sys.stdout.write((json.dumps(ready) if self._ready_json else f"worker at {ready['url']}") + "\n")
        sys.stdout.flush()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """A stop that was asked for is no death by signal."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        yield


async def _serve(server: _Server, listener: socket.socket) -> int:
    await server.serve(sockets=[listener])
    return 0 if server.started else 3
