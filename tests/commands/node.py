"""A node without slots: a real command desk on a scripted stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc

from fleet_agent.commands import CommandDesk, CommandJournal, CommandRoad, Handler
from tests.services.agents.agent import ScriptedAgent
from tests.services.agents.bench import Bench

NODE = "node-1"
Metadata = tuple[tuple[str, str], ...]


class DeskNode(ScriptedAgent):
    """Its desk takes the commands; `dial` again after a loss."""

    def __init__(self, address: str, folder: Path, metadata: Metadata = (), **hello: Any) -> None:
        super().__init__(address, NODE, metadata=metadata, **hello)
        self.desk = CommandDesk(CommandJournal(folder / "commands.db"))
        self.channel = grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
        self.road = CommandRoad(self.channel, metadata)

    async def _read(self, call: Any, ended: asyncio.Event) -> None:
        try:
            async for message in call:
                for one in message.batch.messages if message.HasField("batch") else [message]:
                    if one.HasField("command"):
                        self.desk.take(self.road, message.session, one.command)
                    else:
                        one.session = message.session
                        self.heard.append(one)
        except (grpc.aio.AioRpcError, asyncio.CancelledError):
            pass
        finally:
            ended.set()


@asynccontextmanager
async def node_on(bench: Bench, folder: Path, metadata: Metadata = (), **handlers: Handler) -> AsyncIterator[DeskNode]:
    """A connected node with these handlers; in the end it is gone as if it were killed. `metadata` may hold a key."""
    node = DeskNode(bench.address, folder, metadata)
    for kind, handler in handlers.items():
        node.desk.register(kind, handler)
    await node.desk.open()
    try:
        await node.dial(batches=True)
        yield node
    finally:
        await node.close()
        await node.desk.aclose()
        await node.channel.close()
