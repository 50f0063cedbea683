"""The node as a test holds it: on a thread and a port of its own."""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import Any

import uvicorn

from tests.comfy_node.script import Script
from tests.comfy_node.server import Call, NodeApp
from tests.ports import free_port


class ComfyNode:
    """A node. `with ComfyNode() as node:` serves it; `stop` and `start` are a restart that forgets everything."""

    def __init__(self, script: Script | None = None, **script_fields: Any) -> None:
        self.script = script or Script(**script_fields)
        self.calls: list[Call] = []
        self.port = free_port()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._server: uvicorn.Server | None = None
        self._app: NodeApp | None = None
        self._work: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def app(self) -> NodeApp:
        """What the node knows now: its files, its queue, its history."""
        assert self._app is not None, "the node does not run"
        return self._app

    def called(self, method: str, path: str) -> list[Call]:
        """The requests to a path, in order."""
        return [call for call in list(self.calls) if (call.method, call.path) == (method, path)]

    def __enter__(self) -> ComfyNode:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def start(self) -> None:
        """Listens, on the same port each time."""
        listener = socket.create_server(("127.0.0.1", self.port))
        # (asyncio sets it only on sockets that name their protocol.)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        started = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(listener, started), daemon=True, name="comfy node")
        self._thread.start()
        assert started.wait(50), "the ComfyUI node did not start"

    def stop(self) -> None:
        """Cuts every connection."""
        if self._thread is None or self._loop is None or self._server is None or self._work is None:
            return
        self._server.should_exit = self._server.force_exit = True
        # What runs does not get to its end.
        self._loop.call_soon_threadsafe(self._work.cancel)
        self._loop.call_soon_threadsafe(self._cut)
        self.script.release()
        self._thread.join(50)
        self._thread = None

    def drop_sockets(self) -> None:
        """Closes every WebSocket, as a restarted proxy does; the node works on."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._cut)

    def _cut(self) -> None:
        assert self._app is not None
        for queue in list(self._app.sockets.queues.values()):
            queue.put_nowait(None)

    def _serve(self, listener: socket.socket, started: threading.Event) -> None:
        asyncio.run(self._serve_until_stopped(listener, started))

    async def _serve_until_stopped(self, listener: socket.socket, started: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        app = self._app = NodeApp(self.script, self.calls)
        config = uvicorn.Config(app.routes(), log_level="error", lifespan="off", ws="websockets-sansio")
        server = self._server = uvicorn.Server(config)
        work = self._work = asyncio.create_task(app.executor.work())
        # The listener takes connections from here on; they are answered as soon as the server is up.
        started.set()
        try:
            await server.serve(sockets=[listener])
        finally:
            work.cancel()
