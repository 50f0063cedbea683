"""What the bridge asks of the rest of the server: to run a method with the whole middleware chain."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any, Protocol

import grpc.aio
from google.protobuf.message import Message

Request = Message | AsyncIterator[Message] | Callable[[], Message]
"""A request, a stream of them, or the way to make one of what was sent: called once the caller was let in, so that the
key is judged before anything else."""


class Invoker(Protocol):
    """Runs methods by their gRPC path (`/package.Service/Method`). Both methods raise FleetError only."""

    async def unary(
        self,
        path: str,
        request: Request,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> Message:
        """The reply of a method with one reply."""
        ...

    def stream(
        self,
        path: str,
        request: Request,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncGenerator[Message, None]:
        """The replies of a method with many; closing the generator cancels the call."""
        ...
