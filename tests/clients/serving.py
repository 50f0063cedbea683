"""A small real server that answers as a test wants: for what the fleet's own server does not do on demand."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

Answer = Callable[[Request], Awaitable[Response]]


@dataclass
class Scripted:
    """Answers the nth request with the nth answer, all later ones with the last; keeps what was asked."""

    answers: Sequence[Answer | Response]
    asked: list[Request] = field(default_factory=list)
    bodies: list[Any] = field(default_factory=list)
    url: str = ""

    async def answer(self, request: Request) -> Response:
        body = await request.body()
        self.asked.append(request)
        self.bodies.append(json.loads(body) if body else None)
        answer = self.answers[min(len(self.asked), len(self.answers)) - 1]
        return answer if isinstance(answer, Response) else await answer(request)


@contextmanager
def serving(*answers: Answer | Response) -> Iterator[Scripted]:
    """A server on a free port of loopback."""
    script = Scripted(answers)
    methods = ["GET", "POST", "DELETE"]
    app = Starlette(routes=[Route("/{path:path}", script.answer, methods=methods)])
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off"))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        script.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield script
        finally:
            server.should_exit = True
            thread.join(50)


def reply(body: Any, status: int = 200, **headers: str) -> Response:
    """One JSON reply."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Response(json.dumps(body), status, named, "application/json")


class BrokenOffError(Exception):
    """Makes the server drop the connection in the middle of a reply."""


def stream(*events: dict[str, Any], broken: bool = False, error: dict[str, Any] | None = None) -> Answer:
    """A text/event-stream of these events; then its end, an error event, or a dropped connection."""

    async def chunks() -> AsyncIterator[bytes]:
        yield b": here\n\n"
        for event in events:
            head = f"id: {event['id']}\n" if event["id"] else ""
            yield f"{head}data: {json.dumps(event)}\n\n".encode()
        if error is not None:
            yield f"event: error\ndata: {json.dumps(error)}\n\n".encode()
        if broken:
            raise BrokenOffError

    async def answer(_: Request) -> Response:
        return StreamingResponse(chunks(), media_type="text/event-stream")

    return answer


def job(status: str = "running", **fields: Any) -> dict[str, Any]:
    """A job with every field of the API."""
    return {
        "job_id": "0198f2c4-7a1e-7c3b-9d52-3f0e8a6b1c2d", "job_type": "image_gen", "status": status,
        "wait_reason": None, "priority": "high", "owner": None, "generation": 1, "version": 7, "payload": None,
        "target_cluster": "vision", "target_model": "sdxl", "resolved_model": "sketch", "target_node_id": None,
        "target_labels": {}, "after": [], "group_job_id": None, "child_job_ids": [], "exclusive": False,
        "queue_position": None, "eta_seconds": None, "progress": 50, "step": 10, "steps": 20, "node_id": "agx0",
        "attempt": 1, "max_retries": 3, "timeout_seconds": 3600, "queue_ttl_seconds": 604800, "callback_url": None,
        "create_time": "2026-11-22T10:00:00.120Z", "schedule_time": None, "start_time": None, "end_time": None,
        "update_time": "2026-11-22T10:00:01.020Z", "attempts": [], "result": None, "error": None,
        "timings": {"queued_seconds": 0.19, "load_seconds": None, "run_seconds": None, "upload_seconds": None},
        **fields,
    }  # fmt: skip


def event(kind: str, data: dict[str, Any], event_id: str | None = None) -> dict[str, Any]:
    """An event of the API."""
    return {"id": event_id, "time": "2026-11-22T10:00:02.400Z", "type": kind, "data": data}


def complete(status: str = "succeeded", event_id: str | None = "9-0", **fields: Any) -> dict[str, Any]:
    """The end of a job."""
    result: dict[str, Any] = {
        "outputs": [],
        "text": None,
        "finish_reason": None,
        "segments": [],
        "usage": None,
        "exit_code": None,
    }
    return event("job_complete", job(status, **{"progress": 100, "result": result, **fields}), event_id)
