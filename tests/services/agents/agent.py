"""An agent that does what the test says, over real gRPC."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any

import grpc
from fleet.v1 import node_pb2 as pb
from fleet.v1 import node_pb2_grpc, types_pb2

PATIENCE_SECONDS = 40.0


async def wait_until(ready: Callable[[], Any] | Callable[[], Awaitable[Any]], what: str = "") -> Any:
    """The first truthy answer of `ready`, which may be async; fails after PATIENCE_SECONDS."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + PATIENCE_SECONDS
    while True:
        answer = ready()
        if isinstance(answer, Awaitable):
            answer = await answer
        if answer:
            return answer
        assert loop.time() < deadline, f"waited in vain: {what or ready}"
        await asyncio.sleep(0.005)


def status_lost(error: grpc.aio.AioRpcError) -> bool:
    """Whether the call was refused while it was being written to.

    gRPC's client forgets the server's status then and makes one up, which says nothing: the call is to be made again.
    """
    return error.code() is grpc.StatusCode.INTERNAL and error.details() == "Internal error from Core"


class ScriptedAgent:
    """One agent process: `dial` begins a stream, which may be done again and again; nothing is answered by itself."""

    def __init__(
        self,
        address: str | grpc.aio.Channel,
        node_id: str = "agx0",
        instance_id: str = "boot-1",
        metadata: tuple[tuple[str, str], ...] = (),
        **hello: Any,
    ) -> None:
        self.node_id = node_id
        self.instance_id = instance_id
        self.session = ""
        self.heard: list[pb.ServerMessage] = []
        self.welcome = pb.Welcome()
        self.error: grpc.aio.AioRpcError | None = None
        self.ended = asyncio.Event()
        self.dials = 0
        self._hello = hello
        self._some = asyncio.Event()
        if isinstance(address, str):
            address = grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
        self._metadata = metadata
        self._channel = address
        self.stub: Any = node_pb2_grpc.NodeStub(self._channel)
        self._call: Any = None
        self._reader: asyncio.Task[None] | None = None
        self._sequence = 0

    def hello(self, **changes: Any) -> pb.Hello:
        fields: dict[str, Any] = {
            "protocol_version": 1,
            "node_id": self.node_id,
            "instance_id": self.instance_id,
            "hostname": "bench",
            "slots": 1,
            "engines": [image_engine()],
            "models": [pb.ModelFile(name="sketch", kind="checkpoint", size_bytes=1000, engine="sketch")],
        }
        return pb.Hello(**{**fields, **self._hello, **changes})

    async def dial(self, **changes: Any) -> pb.Welcome:
        """Begins a stream and waits for its Welcome; raises the RpcError that came instead."""
        await self.begin(**changes)
        message = await self.next("welcome")
        self.session = message.session
        self.welcome = message.welcome
        return message.welcome

    async def begin(self, **changes: Any) -> None:
        """Begins a stream and sends its Hello."""
        self.heard.clear()
        self.ended = asyncio.Event()
        self.error = None
        while True:
            self.dials += 1
            self._call = self.stub.Connect(metadata=self._metadata)
            try:
                await self._call.write(pb.AgentMessage(hello=self.hello(**changes)))
            except asyncio.InvalidStateError:
                # It is refused before it has said anything: the reader hears why.
                pass
            except grpc.aio.AioRpcError as error:
                if status_lost(error):
                    continue
                raise
            break
        self._reader = asyncio.create_task(self._read(self._call, self.ended))

    async def send(self, **message: Any) -> None:
        """One message of the present session."""
        await self.send_as(self.session, **message)

    async def send_as(self, session: str, **message: Any) -> None:
        await self._call.write(pb.AgentMessage(session=session, **message))

    async def beat(self, held: Iterable[tuple[str, str]] = (), *, slots: int = 1, **changes: Any) -> pb.HeartbeatAck:
        """A heartbeat and its answer."""
        names = [pb.HeldAttempt(job_id=job_id, token=token) for job_id, token in held]
        self._sequence += 1
        fields: dict[str, Any] = {"slots": slots, "slots_free": slots - len(names), "held": names, **changes}
        await self.send(heartbeat=pb.AgentHeartbeat(sequence=self._sequence, **fields))
        return (await self.next("heartbeat_ack")).heartbeat_ack

    async def next(self, kind: str) -> pb.ServerMessage:
        """The next message of a kind, taken out; the others stay."""

        def found() -> pb.ServerMessage | None:
            for index, message in enumerate(self.heard):
                if message.WhichOneof("message") == kind:
                    return self.heard.pop(index)
            if self.error is not None:
                raise self.error
            assert not self.ended.is_set(), f"the stream ended without {kind}"
            return None

        message: pb.ServerMessage = await wait_until(found, kind)
        return message

    async def take(self) -> pb.Assign:
        """The next Assign, accepted."""
        assign = (await self.next("assign")).assign
        await self.send(accepted=pb.JobAccepted(job_id=assign.job_id, token=assign.token))
        return assign

    async def start(self) -> pb.Assign:
        """The next Assign, accepted and started."""
        assign = await self.take()
        await self.send(started=pb.JobStarted(job_id=assign.job_id, token=assign.token))
        return assign

    async def complete(self, assign: pb.Assign, **fields: Any) -> pb.CompleteOutcome.ValueType:
        """Reports the end of an attempt; what the server made of it."""
        await self.send(complete=pb.JobComplete(job_id=assign.job_id, token=assign.token, **fields))
        ack = (await self.next("complete_ack")).complete_ack
        assert (ack.job_id, ack.token) == (assign.job_id, assign.token)
        return ack.outcome

    async def upload(
        self, assign: pb.Assign, data: bytes, *, index: int = 0, cut_after: int | None = None, **header: Any
    ) -> pb.OutputReceipt:
        """Uploads an output in small chunks; `cut_after` bytes the call is cancelled."""
        fields: dict[str, Any] = {
            "job_id": assign.job_id,
            "token": assign.token,
            "index": index,
            "content_type": "image/png",
            "size_bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }

        async def requests() -> AsyncIterator[pb.UploadOutputRequest]:
            yield pb.UploadOutputRequest(header=pb.UploadHeader(**{**fields, **header}))
            for at in range(0, len(data), 1000):
                if cut_after is not None and at >= cut_after:
                    call.cancel()
                    return
                yield pb.UploadOutputRequest(chunk=data[at : at + 1000])

        while True:
            call = self.stub.UploadOutput(requests(), metadata=self._metadata)
            try:
                reply: pb.UploadOutputResponse = await call
            except grpc.aio.AioRpcError as error:
                if status_lost(error):
                    continue
                raise
            return reply.receipt

    async def nodes(self, **fields: Any) -> list[types_pb2.NodeInfo]:
        """What a caller is told of the nodes."""
        reply = await self.stub.ListNodes(pb.NodeListNodesRequest(**fields))
        return list(reply.nodes)

    async def end(self) -> None:
        """Waits for the end of the stream."""
        await wait_until(self.ended.is_set, "the stream's end")

    async def hang_up(self) -> None:
        """The connection is lost."""
        self._call.cancel()
        await self.end()

    async def finish(self) -> None:
        """Ends the stream in order."""
        await self._call.done_writing()
        await self.end()

    async def close(self) -> None:
        if self._reader is not None:
            self._call.cancel()
            await asyncio.wait([self._reader])
        await self._channel.close()

    async def _read(self, call: Any, ended: asyncio.Event) -> None:
        try:
            async for message in call:
                self.heard.append(message)
        except grpc.aio.AioRpcError as error:
            self.error = error
        except asyncio.CancelledError:
            if not call.cancelled():
                raise
        finally:
            ended.set()


def image_engine(**changes: Any) -> types_pb2.NodeEngine:
    """An engine that paints."""
    fields: dict[str, Any] = {
        "name": "sketch",
        "version": "1",
        "status": "ready",
        "job_types": [types_pb2.JobType.JOB_TYPE_IMAGE_GEN],
    }
    return types_pb2.NodeEngine(**{**fields, **changes})


def uploaded(receipt: pb.OutputReceipt, **fields: Any) -> pb.UploadedOutput:
    """What a JobComplete says of an uploaded picture."""
    return pb.UploadedOutput(receipt=receipt, content_type="image/png", **fields)
