"""What the server asks of nodes besides jobs: sent down the node's stream, answered on a call of the agent's own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
import structlog
import uuid_utils
from fleet.v1 import command_pb2, node_pb2, types_pb2

from fleet_server.domain.errors import Code, FleetError, invalid_field
from fleet_server.services.exchange import Exchange, ServedCall, error_of, offline
from fleet_server.services.fleet import FleetView
from fleet_server.services.nodes import now_ms
from fleet_server.services.refusals import forbidden
from fleet_server.services.relay import Relay

_log = structlog.get_logger("fleet.commands")
Progress = Callable[[types_pb2.OperationProgress], None]
Context = grpc.aio.ServicerContext[Any, Any]

RELAY_TRIES = 2

BEGIN_KEY = "fleet-begin"
"""Initial metadata of a ServeCommand whose command somebody waits for."""


@dataclass(frozen=True, slots=True)
class CommandSettings:
    """Durations of commands, in seconds."""

    head_seconds: float = 10.0
    """A call of an agent says within so long which command it answers."""
    again_seconds: float = 5.0
    """A command that no call answers is sent again so often; the agent knows it by its id."""
    return_seconds: float = 45.0
    """How long the outcome of a command waits for a node that was lost."""
    moved_seconds: float = 1.0
    """Between the word of another server that it does not hold a stream, and the next look at who does."""
    pause_seconds: float = 0.2
    """Between the loss of a call and the next try in the same session."""


class Stream(Protocol):
    """A node's stream."""

    session_id: str
    ended: asyncio.Event

    def send(self, message: node_pb2.ServerMessage) -> None:
        """Queues a control message."""
        ...


class Streams(Protocol):
    """The streams that this replica holds."""

    def live(self, node_id: str) -> Stream | None:
        """The node's stream; None where there is none here."""
        ...


class CommandStream:
    """A command that is answered in parts. Iterate to its end; leaving the context that gave it cancels it."""

    def __init__(self, exchange: Exchange, call: ServedCall) -> None:
        self._exchange = exchange
        self._call = call

    async def __aiter__(self) -> AsyncIterator[command_pb2.ServeCommandRequest]:
        """The parts after the head; the last is the end. Raises FleetError: the agent's, or the loss of the node."""
        while (part := await self._call.parts.get()) is not None:
            if part.WhichOneof("part") == "end":
                error = error_of(part.end)
                if error is not None:
                    raise error
                yield part
                return
            yield part
        raise self._call.error or self._exchange.lost()

    async def send(self, part: command_pb2.ServeCommandResponse) -> bool:
        """Input for the command; waits while the agent takes none. False once the command is over."""
        return await self._call.answers.put(part)


class Commands:
    """Gives commands to nodes. An effect is sent again after a loss under the same id: the agent never repeats it."""

    def __init__(
        self,
        streams: Streams,
        fleet: FleetView,
        settings: CommandSettings | None = None,
    ) -> None:
        self._relay: Relay | None = None
        self._replica = ""
        self._streams = streams
        self._fleet = fleet
        self._settings = settings or CommandSettings()
        self._exchanges: dict[str, Exchange] = {}
        self._deployed_ms: dict[str, int] = {}
        self._changed = asyncio.Event()
        fleet.subscribe_changes(self._on_change)

    def relay_by(self, relay: Relay, replica: str) -> None:
        """Commands for nodes of other servers go there by `relay`; `replica` is this one's name."""
        self._relay, self._replica = relay, replica

    async def run(
        self,
        node_id: str,
        command: command_pb2.Command,
        *,
        timeout: float,  # noqa: ASYNC109 - it travels with the command
        progress: Progress | None = None,
        relayed: bool = False,
    ) -> command_pb2.CommandEnd:
        """The command's end, which has no error.

        A command without an id gets one. Raises NODE_NOT_FOUND, NODE_OFFLINE, TIMEOUT (an effect goes on),
        OUTCOME_UNKNOWN (a crash or a loss hid it: it is not repeated), or the agent's error. Cancelling it ends the
        waiting; an effect goes on. One that was `relayed` by another server goes no further.
        """
        exchange: Exchange | None = None
        try:
            async with asyncio.timeout(timeout):
                exchange = await self._enter(node_id, command, timeout)
                exchange.relayed = relayed
                end = await self._conduct(exchange, progress)
        except TimeoutError:
            if exchange is not None and exchange.sent and self._streams.live(node_id) is None:
                raise exchange.lost() from None
            raise _slow(node_id, timeout) from None
        finally:
            if exchange is not None:
                self._leave(exchange)
        error = error_of(end)
        if error is not None:
            raise error
        return end

    @asynccontextmanager
    async def open(
        self, node_id: str, command: command_pb2.Command, *, relayed: bool = False
    ) -> AsyncGenerator[CommandStream, None]:
        """The command as a stream of parts, once the agent has begun it; `timeout_seconds` is for the agent to judge.

        Raises NODE_NOT_FOUND and NODE_OFFLINE.
        """
        exchange = await self._enter(node_id, command, command.timeout_seconds)
        try:
            stream = self._streams.live(node_id)
            owner = None if relayed else self._owner(node_id)
            if stream is None and owner is not None and self._relay is not None:
                async with self._relay.call(owner, node_id, exchange.command, attended=True) as far:
                    exchange.begun = True
                    yield CommandStream(exchange, far)
                return
            if stream is None:
                raise self._unreachable(node_id)
            call = await self._sent(exchange, stream)
            if call is None:
                raise exchange.lost() if stream.ended.is_set() else _slow(node_id, self._settings.again_seconds)
            yield CommandStream(exchange, call)
        finally:
            self._leave(exchange)

    async def serve(
        self, requests: AsyncIterator[command_pb2.ServeCommandRequest], context: Context, *, only: str = ""
    ) -> AsyncGenerator[command_pb2.ServeCommandResponse, None]:
        """Serves Node.ServeCommand: the agent begins when it has the initial metadata. `only` is the node that may
        answer, "" for any.

        Raises NODE_FORBIDDEN, COMMAND_OVER (NOT_FOUND) where nobody waits for that command.
        """
        head = await self._head(requests)
        exchange = self._exchanges.get(head.command_id)
        if exchange is None or exchange.session_id != head.session:
            raise FleetError("COMMAND_OVER", "nobody waits for this command any more", code=Code.NOT_FOUND)
        if only and exchange.node_id != only:
            raise forbidden("head.command_id: the command is another node's")
        call = exchange.begin()
        reader: asyncio.Task[None] | None = None
        try:
            # An agent that has gone by now is not waited for either.
            await context.send_initial_metadata(((BEGIN_KEY, "yes"),))
            reader = asyncio.create_task(_read(requests, call), name="command-parts")
            while (answer := await call.answers.get()) is not None:
                yield answer
        finally:
            call.parts.end()
            call.answers.close()
            if reader is not None:
                reader.cancel()
                await asyncio.gather(reader, return_exceptions=True)

    def deployed_ms(self, node_id: str) -> int:
        """Until when (Unix ms) this server knows of a deploy on the node: now, where one is under way."""
        under_way = any(one.node_id == node_id and one.deploys for one in self._exchanges.values())
        return now_ms() if under_way else self._deployed_ms.get(node_id, 0)

    # The life of a command.

    async def _enter(self, node_id: str, command: command_pb2.Command, seconds: float) -> Exchange:
        """An exchange of the command's own; another one of the same id must be over first."""
        mine = command_pb2.Command()
        mine.CopyFrom(command)
        mine.command_id = command.command_id or str(uuid_utils.uuid7())
        mine.timeout_seconds = command.timeout_seconds or seconds
        while (other := self._exchanges.get(mine.command_id)) is not None:
            await other.over.wait()
        exchange = Exchange(node_id, mine)
        row = self._fleet.row(node_id) if exchange.deploys else None
        if row is not None and row.draining and row.drain_containers:
            raise FleetError("NO_NODE", f"node_id: {node_id!r} is being drained: uncordon it, or choose another")
        self._exchanges[mine.command_id] = exchange
        return exchange

    def _leave(self, exchange: Exchange) -> None:
        exchange.close()
        if exchange.deploys and exchange.sent:
            self._deployed_ms[exchange.node_id] = now_ms()
        self._exchanges.pop(exchange.command.command_id, None)

    async def _conduct(self, exchange: Exchange, progress: Progress | None) -> command_pb2.CommandEnd:
        tries = 0
        while True:
            owner = None if exchange.relayed else self._owner(exchange.node_id)
            if owner is not None and self._relay is not None:
                tries += 1
                end = await self._relayed(exchange, owner, progress, last=tries == RELAY_TRIES)
                if end is not None:
                    return end
                await asyncio.sleep(self._settings.moved_seconds)
                continue
            call = await self._sent(exchange, await self._stream(exchange))
            if call is None:
                continue
            end = await _followed(call, progress)
            if end is not None:
                return end
            # The call was lost, not the session: the agent is asked again, and knows the command.
            await asyncio.sleep(self._settings.pause_seconds)

    async def _relayed(
        self, exchange: Exchange, owner: str, progress: Progress | None, *, last: bool
    ) -> command_pb2.CommandEnd | None:
        """What the server that holds the stream says; None where it does not any more, or was lost: look again."""
        assert self._relay is not None
        begun = False
        try:
            async with self._relay.call(owner, exchange.node_id, exchange.command, attended=False) as far:
                while (part := await far.parts.get()) is not None:
                    begun = exchange.begun = exchange.sent = True
                    match part.WhichOneof("part"):
                        case "end":
                            return part.end
                        case "progress" if progress is not None:
                            progress(part.progress)
                        case _:
                            pass
            error = far.error or exchange.lost()
        except FleetError as refused:
            error = refused
        # The same id is safe to send again: the node knows it.
        if error.reason != "NODE_OFFLINE":
            raise error
        if last:
            raise exchange.lost() if begun else error
        return None

    def _owner(self, node_id: str) -> str | None:
        """Another server that holds the node's stream."""
        if self._relay is None or self._streams.live(node_id) is not None:
            return None
        view, owner = self._fleet.node(node_id), self._fleet.replica(node_id)
        return owner if view is not None and view.online and owner not in ("", self._replica) else None

    async def _stream(self, exchange: Exchange) -> Stream:
        """The node's stream; a node that was lost with the command is waited for."""
        stream = self._streams.live(exchange.node_id)
        if stream is not None:
            return stream
        if not exchange.sent:
            raise self._unreachable(exchange.node_id)
        try:
            async with asyncio.timeout(self._settings.return_seconds):
                while (stream := self._streams.live(exchange.node_id)) is None:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise exchange.lost() from None
        return stream

    async def _sent(self, exchange: Exchange, stream: Stream) -> ServedCall | None:
        """Sends the command; the call that answers it, None where none came before the stream ended or in time."""
        if not exchange.answered:
            exchange.session_id = stream.session_id
            exchange.sent = True
            stream.send(node_pb2.ServerMessage(command=exchange.command))
        called = asyncio.ensure_future(exchange.called())
        ended = asyncio.ensure_future(stream.ended.wait())
        try:
            await asyncio.wait(
                {called, ended}, timeout=self._settings.again_seconds, return_when=asyncio.FIRST_COMPLETED
            )
            return called.result() if called.done() else None
        finally:
            for task in (called, ended):
                task.cancel()
            await asyncio.gather(called, ended, return_exceptions=True)

    async def _head(self, requests: AsyncIterator[command_pb2.ServeCommandRequest]) -> command_pb2.CommandHead:
        try:
            async with asyncio.timeout(self._settings.head_seconds):
                first = await anext(requests)
        except (TimeoutError, StopAsyncIteration):
            raise invalid_field("head", "must be the first message") from None
        if first.WhichOneof("part") != "head":
            raise invalid_field("head", "must be the first message", first.WhichOneof("part"))
        return first.head

    def _unreachable(self, node_id: str) -> FleetError:
        if self._fleet.node(node_id) is None:
            return FleetError("NODE_NOT_FOUND", f"node_id: there is no node {node_id!r}; see GET /api/nodes")
        return offline(node_id)

    def _on_change(self, node_id: str) -> None:
        self._changed.set()


async def _read(requests: AsyncIterator[command_pb2.ServeCommandRequest], call: ServedCall) -> None:
    """Takes what the agent says, as fast as it is read."""
    try:
        async for part in requests:
            if not await call.parts.put(part):
                return
            if part.WhichOneof("part") == "end":
                with contextlib.suppress(Exception):
                    await call.answers.put(command_pb2.ServeCommandResponse(taken=command_pb2.CommandTaken()))
                return
    finally:
        call.parts.end()
        call.answers.end()


async def _followed(call: ServedCall, progress: Progress | None) -> command_pb2.CommandEnd | None:
    """The end of a command; None where its call was lost."""
    while (part := await call.parts.get()) is not None:
        match part.WhichOneof("part"):
            case "end":
                return part.end
            case "progress" if progress is not None:
                progress(part.progress)
            case _:
                pass
    return None


def _slow(node_id: str, seconds: float) -> FleetError:
    return FleetError(
        "TIMEOUT", f"node {node_id!r} did not answer within {seconds:g} s: ask again, or give it more time"
    )
