"""What `invoke` and the gRPC server know of a method: its descriptor, its rules and the servicer's function."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from fleet.transcode.v1 import options_pb2
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message

from fleet_server.rpc.scopes import ORDINARY, Scope, scope_of

DEFAULT_TIMEOUT_SECONDS = 30.0
DEFAULT_MAX_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Method:
    """One RPC. `timeout_seconds` None means no deadline of ours; `max_request_bytes` bounds one request message."""

    path: str
    descriptor: MethodDescriptor
    handler: Callable[[Any, Any], Any]
    request_class: type[Message]
    timeout_seconds: float | None
    max_request_bytes: int
    public: bool
    scope: Scope = Scope.READ
    admin: bool = False
    """Ordinary keys may not call it."""

    @property
    def client_streaming(self) -> bool:
        return self.descriptor.client_streaming

    @property
    def server_streaming(self) -> bool:
        return self.descriptor.server_streaming


def methods_of(
    service: ServiceDescriptor,
    servicer: object,
    *,
    public: Iterable[str] = (),
    scope_of: Callable[[MethodDescriptor], Scope] = scope_of,
) -> list[Method]:
    """The methods of a servicer; those named in `public` need no key, the others one with the scope of `scope_of`."""
    return [
        _method(descriptor, servicer, descriptor.name in public, scope_of(descriptor)) for descriptor in service.methods
    ]


def _method(descriptor: MethodDescriptor, servicer: object, public: bool, scope: Scope) -> Method:
    rules = descriptor.GetOptions().Extensions[options_pb2.method]
    timeout: float | None = DEFAULT_TIMEOUT_SECONDS
    if rules.HasField("timeout"):
        timeout = rules.timeout.seconds + rules.timeout.nanos / 1e9 or None
    service = descriptor.containing_service
    return Method(
        path=f"/{service.full_name}/{descriptor.name}",
        descriptor=descriptor,
        handler=getattr(servicer, descriptor.name),
        request_class=message_factory.GetMessageClass(descriptor.input_type),
        timeout_seconds=timeout,
        max_request_bytes=rules.max_body_bytes or DEFAULT_MAX_BYTES,
        public=public,
        scope=scope,
        admin=scope not in ORDINARY,
    )
