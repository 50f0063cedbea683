"""The agents' streams."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import grpc
from fleet.v1.node_pb2 import AgentMessage, ServerMessage


class Sessions:
    """The live streams of this replica. `run()` is one task beside them."""

    def connect(
        self, requests: AsyncIterator[AgentMessage], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncGenerator[ServerMessage, None]:
        """Serves Node.Connect."""
        raise NotImplementedError

    async def cancel_attempt(self, job_id: str, node_id: str, token: str) -> None:
        """Tells the node to stop an attempt, as far as it is connected here; the next heartbeat heals what is lost."""
        raise NotImplementedError

    async def run(self) -> None:
        """Loads the nodes, then gives up those that stay away; until cancelled."""
        raise NotImplementedError

    async def shutdown(self, retry_after_seconds: float = 1.0) -> None:
        """Says goodbye to all agents, refuses new ones; returns when all streams have ended."""
        raise NotImplementedError
