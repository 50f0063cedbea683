"""What lies between an agent and the server in these tests: a line that can be cut or stall, and a post that errs.

`Line` passes bytes of TCP on. `Post` passes whole messages of `Node.Connect` on, and may send one twice, late or never,
as its `errs` decides, and holds what its `ambushes` catch; other calls pass through it unharmed.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any, Self

import grpc
from fleet.v1 import node_pb2 as pb

from tests.chaos.ambush import Ambushes, Stream

_CONNECT = "/fleet.v1.Node/Connect"
_UPLOAD = "/fleet.v1.Node/UploadOutput"
_LIMIT = [("grpc.max_receive_message_length", 32 << 20), ("grpc.max_send_message_length", 32 << 20)]
_CHUNK = 1 << 16


class Line:
    """A TCP line to a target that may be away. `cut` ends all connections, `stall` holds what is sent."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._server: asyncio.Server | None = None
        self._flows: set[asyncio.StreamWriter] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self.port = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self.resume()
        self.cut()
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    def cut(self) -> None:
        """Ends what is connected; who comes after is connected again."""
        for writer in tuple(self._flows):
            writer.transport.abort()

    def stall(self) -> None:
        """Nothing passes, nobody is told."""
        self._flowing.clear()

    def resume(self) -> None:
        """Bytes pass again, those that were held first."""
        self._flowing.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._flows.add(writer)
        try:
            with contextlib.suppress(OSError):
                far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
                self._flows.add(far_writer)
                try:
                    there = asyncio.create_task(self._pass(reader, far_writer))
                    back = asyncio.create_task(self._pass(far_reader, writer))
                    await asyncio.wait([there, back], return_when=asyncio.FIRST_COMPLETED)
                    for task in (there, back):
                        task.cancel()
                    await asyncio.gather(there, back, return_exceptions=True)
                finally:
                    self._flows.discard(far_writer)
                    far_writer.transport.abort()
        finally:
            self._flows.discard(writer)
            writer.transport.abort()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(_CHUNK):
                await self._flowing.wait()
                writer.write(data)
                await writer.drain()


class Errs:
    """Decides by a seed what happens to a message. All rates are 0 until `rate` is set."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.rate = 0.0

    def fate(self) -> tuple[int, float]:
        """How many times to send it, and how many seconds later."""
        if self._random.random() >= self.rate:
            return 1, 0.0
        match self._random.randrange(3):
            case 0:
                return 0, 0.0
            case 1:
                return 2, 0.0
            case _:
                return 1, self._random.uniform(0.05, 1.0)


class Post:
    """A gRPC server that hands every call on to the server at `target`. `seen` counts what agents and server said."""

    def __init__(self, target: int, errs: Errs) -> None:
        self._target = target
        self._errs = errs
        self._server = grpc.aio.server(options=[*_LIMIT, ("grpc.so_reuseport", 0)])
        self._server.add_generic_rpc_handlers((_Everything(self._call),))
        self._channel: grpc.aio.Channel | None = None
        self.port = 0
        self.seen: Counter[str] = Counter()
        self.ambushes = Ambushes()

    async def __aenter__(self) -> Self:
        options = [*_LIMIT, ("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 500)]
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{self._target}", options=options)
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._server.stop(0)
        if self._channel is not None:
            await self._channel.close()

    async def _call(self, path: str, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        assert self._channel is not None
        metadata = [(name, value) for name, value in context.invocation_metadata() if not name.startswith("grpc-")]
        call: Any = self._channel.stream_stream(path)(metadata=metadata)
        stream = Stream(call) if path == _CONNECT else None
        upward = asyncio.create_task(self._upward(requests, call, stream))
        try:
            async for reply in _read(call):
                times, late = self._down(stream, reply) if stream is not None else (1, 0.0)
                await asyncio.sleep(late)
                for _ in range(times):
                    yield reply
        except grpc.aio.AioRpcError as error:
            if path == _UPLOAD and error.code() is grpc.StatusCode.FAILED_PRECONDITION:
                self.seen["refused_upload"] += 1
            await context.abort(error.code(), error.details() or "", tuple(error.trailing_metadata() or ()))
        finally:
            if stream is not None:
                self.ambushes.gone(stream)
            upward.cancel()
            call.cancel()
            await asyncio.gather(upward, return_exceptions=True)

    async def _upward(self, requests: AsyncIterator[bytes], call: Any, stream: Stream | None) -> None:
        async for request in requests:
            if stream is None:
                await call.write(request)
                continue
            message = pb.AgentMessage.FromString(request)
            self._note(message)
            spared = await self.ambushes.up(stream, message)
            times, late = (1, 0.0) if spared else self._fate()
            await asyncio.sleep(late)
            for _ in range(times):
                await stream.write(request)
        await call.done_writing()

    def _down(self, stream: Stream, reply: bytes) -> tuple[int, float]:
        message = pb.ServerMessage.FromString(reply)
        self._note(message)
        return (1, 0.0) if self.ambushes.down(stream, message) else self._fate()

    def _note(self, message: pb.AgentMessage | pb.ServerMessage) -> None:
        for one in message.batch.messages if message.HasField("batch") else [message]:
            name: str | None = one.WhichOneof("message")
            if isinstance(one, pb.ServerMessage) and one.HasField("complete_ack"):
                name = pb.CompleteOutcome.Name(one.complete_ack.outcome).lower()
            self.seen[str(name)] += 1

    def _fate(self) -> tuple[int, float]:
        """How many times a message is sent, and how many seconds later."""
        times, late = self._errs.fate()
        if (times, late) != (1, 0.0):
            self.seen["lost" if not times else "doubled" if times == 2 else "delayed"] += 1
        return times, late


async def _read(call: Any) -> AsyncIterator[bytes]:
    while (reply := await call.read()) is not grpc.aio.EOF:
        yield reply
    if await call.code() is not grpc.StatusCode.OK:
        raise grpc.aio.AioRpcError(
            await call.code(), await call.initial_metadata(), await call.trailing_metadata(), await call.details()
        )


Serve = Callable[[str, AsyncIterator[bytes], Any], AsyncIterator[bytes]]


class _Everything(grpc.GenericRpcHandler):
    """Every method as a stream of bytes both ways: on the wire a unary call is one of a single message."""

    def __init__(self, serve: Serve) -> None:
        self._serve = serve

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        path: str = handler_call_details.method

        async def handle(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
            async for reply in self._serve(path, requests, context):
                yield reply

        return grpc.stream_stream_rpc_method_handler(handle)
