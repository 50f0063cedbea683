"""The bridge on a real uvicorn, with clients that speak to it over TCP."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx
import uvicorn
import websockets

from fleet_server.bridge import Bridge, BridgeSettings
from tests.bridge.library import Library, bridge_of
from tests.bridge.raw_http import port_of, wait_until


@dataclass(frozen=True, slots=True)
class Served:
    """One bridge, served."""

    library: Library
    bridge: Bridge
    server: uvicorn.Server
    client: httpx.AsyncClient

    def socket(self, path: str, **more: Any) -> Any:
        """A WebSocket client's connection, to be awaited or entered."""
        return websockets.connect(f"ws://127.0.0.1:{port_of(self.server)}{path}", **more)


@contextlib.asynccontextmanager
async def served(**settings: Any) -> AsyncIterator[Served]:
    """A library behind the bridge; `settings` are the bridge's.

    Fails after 45 seconds: uvloop swallows the exception of pytest-timeout's signal.
    """
    library = Library()
    bridge = bridge_of(library, settings=BridgeSettings(**settings))
    config = uvicorn.Config(
        bridge, host="127.0.0.1", port=0, lifespan="off", log_level="warning", http="httptools", ws="websockets-sansio"
    )
    server = uvicorn.Server(config)
    async with asyncio.timeout(45):
        task = asyncio.create_task(server._serve())
        try:
            await wait_until(lambda: server.started or task.done())
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port_of(server)}", timeout=60) as client:
                yield Served(library, bridge, server, client)
        finally:
            await bridge.shut_down()
            server.should_exit = server.force_exit = True
            await task
