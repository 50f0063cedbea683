"""The service of the bridge's tests: ordinary grpc.aio servicers, an invoker for them, and clients."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from typing import Any

import grpc
import httpx
from google.api import httpbody_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from fleet_server.bridge import Bridge, BridgeSettings, SpecialRoute
from fleet_server.domain.errors import Code, FleetError
from tests.protos import load

pb: Any = load("transcode_service")
SERVICE: Any = pb.DESCRIPTOR.services_by_name["Library"]

Handler = Callable[[Any, Any], Any]


class Library:
    """A servicer. Each method does one plain thing; `on(name, handler)` puts another behaviour in its place."""

    def __init__(self) -> None:
        self.requests: list[Message] = []
        self.entered = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.release = asyncio.Event()
        self.ended: list[bool] = []
        self._handlers: dict[str, Handler] = {}

    def on(self, name: str, handler: Handler) -> None:
        """Let `handler(request, context)` serve a method."""
        self._handlers[name] = handler

    def method(self, name: str) -> Handler:
        """What serves a method."""
        return self._handlers.get(name) or getattr(self, name)

    async def GetBook(self, request: Any, context: Any) -> Any:
        return pb.Book(book_id=request.book_id, title="full" if request.full else "", shelf=request.shelf)

    async def GetDefaultBook(self, request: Any, context: Any) -> Any:
        return pb.Book(book_id="the default", kind=pb.BOOK_KIND_ATLAS)

    async def ListBooks(self, request: Any, context: Any) -> Any:
        return pb.BookList(request=request, first=pb.Book(book_id="1"), titles=["a", "b"])

    FirstBook = ListTitles = ListBooks

    async def _same(self, request: Any, context: Any) -> Any:
        return request

    CreateBook = UpdateBook = TagBook = ArchiveBook = DeleteBook = GetFile = PutRaw = PutWhole = _same

    async def Echo(self, request: Any, context: Any) -> Any:
        metadata = sorted(f"{key}={value}" for key, value in context.invocation_metadata())
        return pb.EchoReply(metadata=metadata, peer=context.peer(), time_remaining_seconds=context.time_remaining())

    async def Render(self, request: Any, context: Any) -> Any:
        await context.send_initial_metadata((("x-seed", "1"), ("x-filename", "é.png"), ("content-length", "99")))
        return httpbody_pb2.HttpBody(content_type="image/png", data=b"\x89PNG\x00")

    async def GetCover(self, request: Any, context: Any) -> Any:
        return pb.Cover(body=httpbody_pb2.HttpBody(data=b"cover"))

    async def Upload(self, requests: AsyncIterator[Any], context: Any) -> Any:
        reply = pb.UploadReply()
        async for request in requests:
            if not reply.messages:
                reply.name, reply.note, reply.content_type = request.name, request.note, request.file.content_type
            reply.messages += 1
            reply.size_bytes += len(request.file.data)
        return reply

    async def Wait(self, request: Any, context: Any) -> Any:
        context.add_done_callback(lambda ended: self.ended.append(ended.cancelled()))
        self.entered.set()
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return request

    Steady = Wait

    async def Watch(self, request: Any, context: Any) -> AsyncGenerator[Any, None]:
        for index in range(request.count):
            yield pb.Event(id=str(index), text=request.topic)

    WatchIds = Watch

    async def WatchTicks(self, request: Any, context: Any) -> AsyncGenerator[Any, None]:
        yield pb.Tick(id=0)
        yield pb.Tick()

    async def Download(self, request: Any, context: Any) -> AsyncGenerator[Any, None]:
        for index in range(3):
            yield httpbody_pb2.HttpBody(content_type="image/png" if not index else "", data=bytes([65 + index]) * 4)

    async def Chat(self, requests: AsyncIterator[Any], context: Any) -> AsyncGenerator[Any, None]:
        async for request in requests:
            yield request


class LibraryInvoker:
    """Runs the servicer's methods: deadlines, and every other fault as a FleetError."""

    def __init__(self, library: Library) -> None:
        self.library = library

    async def unary(self, path: str, request: Any, context: Any) -> Message:
        if callable(request):
            request = request()
        if isinstance(request, Message):
            self.library.requests.append(request)
        try:
            async with asyncio.timeout(context.time_remaining()):
                reply: Message = await self.library.method(path.rpartition("/")[2])(request, context)
                return reply
        except TimeoutError:
            raise FleetError("TIMEOUT", "the deadline has passed") from None

    async def stream(self, path: str, request: Any, context: Any) -> AsyncGenerator[Message, None]:
        if callable(request):
            request = request()
        if isinstance(request, Message):
            self.library.requests.append(request)
        async with contextlib.aclosing(self.library.method(path.rpartition("/")[2])(request, context)) as replies:
            async for reply in replies:
                yield reply


def bridge_of(
    library: Library,
    *,
    settings: BridgeSettings | None = None,
    special: Iterable[SpecialRoute] = (),
    required_paths: Iterable[str] = (),
) -> Bridge:
    """The bridge in front of a library."""
    return Bridge([SERVICE], LibraryInvoker(library), settings=settings, special=special, required_paths=required_paths)


def client_of(app: Any) -> httpx.AsyncClient:
    """An HTTP client that calls the application in this process."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test")


def check_error(reply: httpx.Response, status: int, reason: str, *, field: str | None = None) -> dict[str, Any]:
    """The reply is this error, in the one shape of all errors; its object is returned."""
    body: dict[str, Any] = reply.json()
    assert (reply.status_code, body["reason"]) == (status, reason), reply.text
    assert list(body) == ["detail", "code", "reason", "request_id", "violations"]
    assert body["request_id"] == reply.headers["x-request-id"]
    assert reply.headers["content-type"] == "application/json"
    assert body["code"] in Code.__members__
    if field is not None:
        assert body["detail"].startswith(f"{field}:"), body
        assert [item["field"] for item in body["violations"]] == [field]
    return body


async def abort_with_details(context: Any) -> None:
    """Abort as servicers with rich errors do."""
    status = status_pb2.Status(code=grpc.StatusCode.UNAVAILABLE.value[0], message="queue: it is full")
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason="QUEUE_FULL", domain="test"))
    bad = error_details_pb2.BadRequest(
        field_violations=[error_details_pb2.BadRequest.FieldViolation(field="queue", description="it is full")]
    )
    status.details.add().Pack(bad)
    retry = error_details_pb2.RetryInfo()
    retry.retry_delay.FromMilliseconds(2500)
    status.details.add().Pack(retry)
    trailers = (("grpc-status-details-bin", status.SerializeToString()),)
    await context.abort(grpc.StatusCode.UNAVAILABLE, status.message, trailers)
