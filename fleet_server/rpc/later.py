"""RPCs whose features this version does not have."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Any, TypeVar

from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor

from fleet_server.domain.errors import FleetError

S = TypeVar("S", bound=type)


def others_later(service: ServiceDescriptor) -> Callable[[S], S]:
    """Makes a servicer answer 501 NOT_IMPLEMENTED for each method of `service` that it does not have."""

    def fill(servicer: S) -> S:
        for method in service.methods:
            if not hasattr(servicer, method.name):
                setattr(servicer, method.name, _stream(method) if method.server_streaming else _unary(method))
        return servicer

    return fill


def _refusal(method: MethodDescriptor) -> FleetError:
    return FleetError("NOT_IMPLEMENTED", f"{method.name} is not available in this version of Fleet Commander")


def _unary(method: MethodDescriptor) -> Callable[..., Any]:
    async def call(self: object, request: Any, context: Any) -> Any:
        raise _refusal(method)

    return call


def _stream(method: MethodDescriptor) -> Callable[..., Any]:
    async def call(self: object, request: Any, context: Any) -> AsyncGenerator[Any, None]:
        raise _refusal(method)
        yield

    return call
