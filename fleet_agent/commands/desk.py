"""Takes the server's commands, runs their handlers, answers each on a call of its own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import structlog
from fleet.v1 import command_pb2

from fleet_agent.commands.call import CallOverError, CommandCall, CommandRoad
from fleet_agent.commands.channel import CommandChannel
from fleet_agent.commands.faults import CommandFault, unknown
from fleet_agent.commands.journal import CommandJournal

T = TypeVar("T")
_log = structlog.get_logger("fleet.agent.commands")
Handler = Callable[[command_pb2.Command, CommandChannel], Awaitable[command_pb2.CommandEnd]]

EFFECTS = frozenset(
    {
        *("deploy", "remove", "exec", "load_model", "unload_model", "download"),
        *("scale_service", "update_service", "rollback_service"),
    }
)
"""They go on when their call is lost, and are journalled: the same id never takes effect twice."""
ONCE = frozenset({"exec_stream"})
"""They end with their call, and are journalled: what was begun cannot be joined."""


@dataclass(slots=True)
class _Effect:
    """An effect under way, whoever listens."""

    channel: CommandChannel = field(default_factory=CommandChannel)
    task: asyncio.Task[command_pb2.CommandEnd] | None = None


@dataclass(slots=True)
class _Serving:
    """A command that is being answered. `ended`: the server was told how it ended.

    `again`: it came again meanwhile, which says that the server may have lost the call.
    """

    session: str
    task: asyncio.Task[None] | None = None
    ended: bool = False
    again: bool = False


class CommandDesk:
    """`register` the handlers, `open`, then `take` what comes; `aclose` in the end.

    Reads, and programs that a caller stays connected to, end when their call does: their handler is cancelled.
    """

    def __init__(self, journal: CommandJournal, *, limit: int = 256, finish_seconds: float = 10) -> None:
        self._journal = journal
        self._limit = limit
        self._finish_seconds = finish_seconds
        self._handlers: dict[str, Handler] = {}
        self._serving: dict[str, _Serving] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._effects: dict[str, _Effect] = {}

    def register(self, kind: str, handler: Handler) -> None:
        """`handler` runs the commands of this kind (the name in the oneof of Command)."""
        self._handlers[kind] = handler

    async def open(self) -> list[str]:
        """The ids of effects whose outcome an earlier process left unknown. Raises OSError."""
        return await self._journal.open()

    def take(self, road: CommandRoad, session: str, command: command_pb2.Command) -> None:
        """A command came. It comes again where its call was lost, or did not reach the server in time."""
        command_id = command.command_id
        known = self._serving.get(command_id)
        if known is not None:
            if known.session == session and not known.ended:
                known.again = True
                return
            if known.session != session and known.task is not None:
                known.task.cancel()
        if len(self._tasks) >= self._limit:
            # The server sends it again.
            _log.warning("too many commands at once", command_id=command_id)
            return
        kept = command_pb2.Command()
        kept.CopyFrom(command)
        serving = self._serving[command_id] = _Serving(session)
        task = serving.task = asyncio.create_task(self._serve(road, serving, kept), name=f"command-{command_id}")
        self._tasks.add(task)
        task.add_done_callback(lambda done: self._served(road, serving, kept, done))

    async def aclose(self) -> None:
        """Ends every command; effects that are not over by now stay unknown."""
        tasks: list[asyncio.Task[Any]] = list(self._tasks)
        tasks += [effect.task for effect in self._effects.values() if effect.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._journal.aclose()

    def _served(
        self, road: CommandRoad, serving: _Serving, command: command_pb2.Command, done: asyncio.Task[None]
    ) -> None:
        command_id = command.command_id
        self._tasks.discard(done)
        if self._serving.get(command_id) is serving:
            del self._serving[command_id]
            if serving.again and not serving.ended and not done.cancelled():
                self.take(road, serving.session, command)
        if not done.cancelled() and (error := done.exception()) is not None:
            _log.error("a command could not be served", command_id=command_id, exc_info=error)

    async def _serve(self, road: CommandRoad, serving: _Serving, command: command_pb2.Command) -> None:
        kind = command.WhichOneof("command") or ""
        try:
            call = await road.begin(serving.session, command.command_id)
        except CallOverError:
            return
        try:
            handler = self._handlers.get(kind)
            if handler is None:
                detail = f"this agent does not know the command {kind or 'that was sent'}: install the server's release"
                end: command_pb2.CommandEnd | None = CommandFault("NOT_IMPLEMENTED", detail).end
            elif kind in EFFECTS:
                end = await self._joined(call, handler, command)
            else:
                end = await self._attended(call, handler, command, once=kind in ONCE)
            if end is not None:
                serving.ended = True
                await call.finish(end, self._finish_seconds)
        except CallOverError:
            pass
        finally:
            call.cancel()

    # Effects.

    async def _joined(
        self, call: CommandCall, handler: Handler, command: command_pb2.Command
    ) -> command_pb2.CommandEnd | None:
        """The end of an effect, which is begun unless it runs already; None where the call was lost first."""
        effect = self._effects.get(command.command_id)
        if effect is None:
            effect = self._effects[command.command_id] = _Effect()
            effect.task = asyncio.create_task(self._perform(effect, handler, command))
            effect.task.add_done_callback(lambda _: self._effects.pop(command.command_id, None))
        assert effect.task is not None
        effect.channel.call = call
        try:
            return await _first(effect.task, call, keep=True)
        finally:
            if effect.channel.call is call:
                effect.channel.call = None

    async def _perform(self, effect: _Effect, handler: Handler, command: command_pb2.Command) -> command_pb2.CommandEnd:
        command_id = command.command_id
        try:
            before = await self._journal.begin(command_id)
        except OSError as error:
            return _not_noted(error).end
        if before is not None:
            return before
        end, acted = await _handled(handler, command, effect.channel)
        try:
            if acted:
                await self._journal.end(command_id, end)
            else:
                await self._journal.forget(command_id)
        except OSError as error:
            # It stays begun: after a restart it is unknown, and it is never repeated.
            _log.error("the end of a command was not noted", command_id=command_id, error=str(error))
        return end

    # Reads, and what ends with its call.

    async def _attended(
        self, call: CommandCall, handler: Handler, command: command_pb2.Command, *, once: bool
    ) -> command_pb2.CommandEnd | None:
        if once:
            try:
                if await self._journal.begin(command.command_id) is not None:
                    return unknown("the command was begun before").end
            except OSError as error:
                return _not_noted(error).end
        work = asyncio.ensure_future(_handled(handler, command, CommandChannel(call)))
        try:
            found = await _first(work, call, keep=False)
        finally:
            if once:
                with contextlib.suppress(OSError):
                    await self._journal.end(command.command_id, unknown("the command was begun before").end)
        return None if found is None else found[0]


async def _first(work: asyncio.Future[T], call: CommandCall, *, keep: bool) -> T | None:
    """What `work` gives; None where the call is over first: then it is cancelled unless it is to be kept."""
    over = asyncio.ensure_future(call.over.wait())
    try:
        waiting: set[asyncio.Future[Any]] = {work, over}
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        return work.result() if work.done() else None
    finally:
        over.cancel()
        if not keep and not work.done():
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)


async def _handled(
    handler: Handler, command: command_pb2.Command, channel: CommandChannel
) -> tuple[command_pb2.CommandEnd, bool]:
    """The end that a handler came to, and whether it may have changed something."""
    try:
        return await handler(command, channel), True
    except CommandFault as fault:
        return fault.end, fault.acted
    except CallOverError:
        raise
    except Exception as error:
        _log.exception("a command failed", command_id=command.command_id)
        detail = f"the agent failed at the command ({type(error).__name__}): see its log"
        return CommandFault("INTERNAL", detail).end, True


def _not_noted(error: OSError) -> CommandFault:
    _log.error("a command was not noted", error=str(error))
    return CommandFault("DISK_FULL", "the node cannot note the command in its journal: make room on its disk")
