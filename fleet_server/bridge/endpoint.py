"""One binding made ready to serve: its binder, its encoder and its rules, worked out once at start."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import partial
from typing import Any, Final

from fleet.transcode.v1 import options_pb2
from google.protobuf.message import Message

from fleet_server.bridge.asgi import Call
from fleet_server.bridge.binding import RequestBinder
from fleet_server.bridge.body import announced_length, body_chunks, body_too_large, read_body
from fleet_server.bridge.context import InProcContext
from fleet_server.bridge.httprule import Binding, takes_raw_body
from fleet_server.bridge.invoker import Invoker, Request
from fleet_server.bridge.multipart import FilePart, is_multipart
from fleet_server.bridge.replies import ReplyEncoder, SharedEncodings, reply_head
from fleet_server.bridge.routes import Variables
from fleet_server.bridge.settings import BridgeSettings
from fleet_server.bridge.streams import StreamReply
from fleet_server.bridge.supervise import LiveCalls, Stop, disconnect_watcher, supervise
from fleet_server.bridge.websocket import SocketCall
from fleet_server.domain.errors import FleetError
from fleet_server.protojson import JsonCodec

DEFAULT_BODY_BYTES: Final = 1024 * 1024


class Endpoint:
    """Serves the calls of one binding."""

    def __init__(
        self,
        binding: Binding,
        invoker: Invoker,
        codec: JsonCodec,
        settings: BridgeSettings,
        shared: SharedEncodings,
        live: LiveCalls,
    ) -> None:
        method = binding.method
        rules = method.GetOptions().Extensions[options_pb2.method]
        share = method.output_type.full_name in settings.shared_messages
        self.binding = binding
        self._path = binding.rpc_path
        self._invoker = invoker
        self._settings = settings
        self._live = live
        self._binder = RequestBinder(binding, codec)
        self._encoder = ReplyEncoder(binding, codec, shared if share else None)
        self._limit = rules.max_body_bytes or DEFAULT_BODY_BYTES
        self._cancel_on_disconnect = rules.cancel_on_disconnect
        self._streams_out = method.server_streaming
        self._bidirectional = method.client_streaming
        self._filename = _filename_field(binding)
        self._uploads = method.client_streaming and takes_raw_body(binding)

    async def serve(self, call: Call, context: InProcContext, variables: Variables) -> None:
        """Answer one HTTP request. Raises FleetError only before anything was sent."""
        reason: Stop | None = None
        try:
            request: Request
            if self._uploads:
                request = self._upload(call, variables)
            else:
                body = call.body_at_hand() if _has_body(call) else b""
                if body is None:
                    body = await self._body(call)
                elif len(body) > self._limit:
                    raise body_too_large(self._limit)
                query, content_type = call.scope["query_string"], call.headers.get(b"content-type")
                request = partial(self._binder.bind, variables, query, body, content_type)
            if self._streams_out:
                reason = await self._stream(call, context, request)
            elif self._cancel_on_disconnect:
                main = self._unary(call, context, request)
                reason = await supervise(main, [disconnect_watcher(call.receive)])
            else:
                await self._unary(call, context, request)
        except asyncio.CancelledError:
            reason = Stop.GONE
            raise
        finally:
            context.finish(cancelled=reason is not None and reason.is_callers)

    async def serve_socket(self, call: Call, context: InProcContext, variables: Variables) -> None:
        """Answer one WebSocket. Raises FleetError only before the upgrade."""
        self._refuse_when_closing()
        socket = SocketCall(call, context, self._binder, self._encoder, self._settings, variables)
        reason: Stop | None = Stop.GONE
        try:
            reason = await socket.run(self._invoker, self._path, bidirectional=self._bidirectional, live=self._live)
        finally:
            context.finish(cancelled=reason is not None and reason.is_callers)

    async def _body(self, call: Call) -> bytes:
        announced_length(call.headers, self._limit)
        return await read_body(call.receive, self._limit, self._settings)

    async def _upload(self, call: Call, variables: Variables) -> AsyncIterator[Message]:
        """A body as a stream of requests: path and query ride in the first, each holds a piece of the bytes."""
        announced_length(call.headers, self._limit)
        content_type = call.headers.get(b"content-type")
        query = call.scope["query_string"]
        async with aclosing(body_chunks(call.receive, self._limit, self._settings)) as body:
            part = FilePart(content_type) if self._filename and content_type and is_multipart(content_type) else None
            async with aclosing(body if part is None else part.chunks(body)) as chunks:
                async for chunk in chunks:
                    request: Any = self._binder.bind_texts(variables, query)
                    self._binder.raw_body(request, chunk, content_type if part is None else part.content_type)
                    if part is not None and part.filename and not getattr(request, self._filename):
                        setattr(request, self._filename, part.filename)
                    yield request
                    variables, query = (), b""

    async def _unary(self, call: Call, context: InProcContext, request: Request) -> None:
        reply = await self._invoker.unary(self._path, request, context)
        failure = context.failure()
        if failure is not None:
            raise failure
        body, content_type = self._encoder.unary(reply)
        if context.initial_metadata is None:
            await call.reply_plain(content_type, body)
            return
        status, headers = reply_head(context.initial_metadata)
        headers = [(name, value) for name, value in headers if name not in (b"content-length", b"content-type")]
        if status != 304:
            headers.append((b"content-type", content_type))
        await call.reply(status, headers, body)

    async def _stream(self, call: Call, context: InProcContext, request: Request) -> Stop | None:
        self._refuse_when_closing()
        replies = self._invoker.stream(self._path, request, context)
        return await StreamReply(call, context, replies, self._encoder, self._settings).run(self._live)

    def _refuse_when_closing(self) -> None:
        if self._live.closing:
            raise FleetError("SHUTTING_DOWN", "the server is stopping; connect again")


def _filename_field(binding: Binding) -> str:
    """The request's field for the name of a multipart body's file, "" where such bodies are bytes like any other."""
    return next(
        (
            field.name
            for field in binding.method.input_type.fields
            if field.GetOptions().Extensions[options_pb2.field].multipart_filename
        ),
        "",
    )


def _has_body(call: Call) -> bool:
    headers = call.headers
    return b"content-length" in headers or b"transfer-encoding" in headers or call.scope["http_version"] == "2"
