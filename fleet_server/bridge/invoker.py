"""What the bridge asks of the rest of the server: to run a method with the whole middleware chain."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any, Protocol

import grpc.aio
from google.protobuf.message import Message

Request = Message | AsyncIterator[Message] | Callable[[], Awaitable[Message]]
"""A request, a stream of them, or the way to read one: it is called once the caller was let in, so that nobody learns
of faults in a body before the key was judged."""


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
