"""Somebody who is called back: takes some callbacks, refuses some, lets some hang, and writes down all that it took."""

from __future__ import annotations

import asyncio
import base64
import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from standardwebhooks import Webhook
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tests.ports import free_ports
from tests.waiting import wait_until

SECRET = "whsec_" + base64.b64encode(b"thirty-two bytes for these tests").decode()
HANG_SECONDS = 1.5


class Receiver:
    """`taken` holds a callback for each time it was taken; a signature that does not verify is an exception there."""

    def __init__(self, seed: int) -> None:
        self.taken: list[dict[str, Any]] = []
        self.forged: list[str] = []
        self.refused = 0
        self.url = ""
        self._random = random.Random(seed)
        self.calm = False
        self._app = Starlette(routes=[Route("/hook", self._take, methods=["POST"])])

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Receiver]:
        """A server on a free port of loopback while the block runs."""
        (port,) = free_ports(1)
        server = uvicorn.Server(uvicorn.Config(self._app, port=port, log_level="critical", lifespan="off"))
        task = asyncio.create_task(server.serve())
        await wait_until(lambda: server.started)
        self.url = f"http://127.0.0.1:{port}/hook"
        try:
            yield self
        finally:
            server.should_exit = True
            await task

    def ends(self) -> set[tuple[str, int]]:
        """(job, generation) of every callback that was taken."""
        return {(hook["job_id"], hook["generation"]) for hook in self.taken}

    async def _take(self, request: Request) -> Response:
        body = await request.body()
        try:
            Webhook(SECRET).verify(body, dict(request.headers))
        except Exception as error:  # whatever is wrong with it, it is for the checker
            self.forged.append(repr(error))
            return Response(status_code=400)
        roll = 1.0 if self.calm else self._random.random()
        if roll < 0.05:
            await asyncio.sleep(HANG_SECONDS)
        if roll < 0.3:
            self.refused += 1
            return Response(status_code=500)
        job = json.loads(body)["data"]
        hook = {"job_id": job["job_id"], "generation": job["generation"], "status": job["status"]}
        self.taken.append({**hook, "webhook_id": request.headers["webhook-id"]})
        return Response()
