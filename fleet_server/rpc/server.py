"""The gRPC server: generic handlers made from `invoke`, health and reflection."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from fleet_server.domain.errors import FleetError
from fleet_server.rpc.caller import read_metadata
from fleet_server.rpc.invoke import Invoker
from fleet_server.rpc.methods import Method
from fleet_server.rpc.status import DETAILS_KEY, grpc_code, rich_status
from fleet_server.services.authority import Pair

PING_MS = 10_000


def keepalive(ping_ms: int) -> tuple[tuple[str, int], ...]:
    """Options under which both ends ping each `ping_ms`, with and without calls, and a peer that does so is let be."""
    return (
        ("grpc.keepalive_time_ms", ping_ms),
        ("grpc.keepalive_timeout_ms", ping_ms // 2),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        # What C calls GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS; another name is not heard, and five
        # minutes hold.
        ("grpc.http2.min_ping_interval_without_data_ms", ping_ms // 2),
        ("grpc.http2.max_ping_strikes", 2),
    )


OPTIONS: Sequence[tuple[str, int]] = (
    *keepalive(PING_MS),
    # Each follower of events or logs is a stream, many may share a connection, and ended calls count until they are
    # swept up: with 100, sixty busy callers on one connection were refused now and then.
    ("grpc.max_concurrent_streams", 2_000),
    # A batch is judged by `invoke`; this is the bound before decoding.
    ("grpc.max_receive_message_length", 17_825_792),
    ("grpc.so_reuseport", 0),
)
"""The defaults of a server would answer a client that pings every 10 s with GOAWAY after 40 s."""


@dataclass(frozen=True, slots=True)
class Tls:
    """`pair` gives the server's key and certificate; it is asked at each handshake, in a thread, and must be quick.
    `authority` is the certificate (PEM) that callers' certificates must come from."""

    pair: Callable[[], Pair]
    authority: bytes


def _credentials(tls: Tls, certificates: bool) -> grpc.ServerCredentials:
    shown: list[Pair] = []

    def configuration() -> grpc.ServerCertificateConfiguration | None:
        pair = tls.pair()
        if shown and shown[-1] is pair:
            return None
        shown[:] = [pair]
        return grpc.ssl_server_certificate_configuration(
            [(pair.key, pair.chain)], root_certificates=tls.authority if certificates else None
        )

    first = configuration()
    assert first is not None
    # None from the fetcher is "as before", which the stubs do not say.
    fetcher = cast("Callable[[], grpc.ServerCertificateConfiguration]", configuration)
    return grpc.dynamic_ssl_server_credentials(first, fetcher, certificates)


class GrpcServer:
    """Serves the methods of an Invoker. `listen` on one address or more, `start`, then `stop`, once each."""

    def __init__(self, invoker: Invoker, *, options: Sequence[tuple[str, int]] = OPTIONS) -> None:
        self._server = grpc.aio.server(options=list(options))
        self._health = health.aio.HealthServicer()
        services: dict[str, list[Method]] = defaultdict(list)
        for method in invoker.methods:
            services[method.descriptor.containing_service.full_name].append(method)
        for service, methods in services.items():
            handlers = {method.descriptor.name: _handler(invoker, method) for method in methods}
            self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
        self._names = [*services, health.SERVICE_NAME, reflection.SERVICE_NAME]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(self._names, self._server)

    async def listen(self, address: str, *, tls: Tls | None = None, certificates: bool = False) -> int:
        """Binds `address` (host:port or unix:path) and returns the port; before `start`. Raises OSError where it is
        taken. With `certificates` each caller must show one of the authority's: gRPC can either demand them of
        everybody or not ask at all, so they have a door of their own.
        """
        try:
            if tls is None:
                return self._server.add_insecure_port(address)
            return self._server.add_secure_port(address, _credentials(tls, certificates))
        except RuntimeError as error:
            raise OSError(f"cannot listen for gRPC on {address}: {error}") from error

    async def start(self, address: str | None = None) -> int:
        """Serves what was bound, and `address`, whose port is returned (0 without). Raises OSError."""
        port = 0 if address is None else await self.listen(address)
        await self._server.start()
        await self.set_serving(True)
        return port

    async def set_serving(self, serving: bool) -> None:
        """What health checks are told, for each service and for the whole."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ["", *self._names]:
            await self._health.set(name, status)

    async def stop(self, grace_seconds: float) -> None:
        """Refuses new calls, gives those under way `grace_seconds`, then cancels them."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_seconds)


def _handler(invoker: Invoker, method: Method) -> grpc.RpcMethodHandler[Any, Any]:
    makers: dict[tuple[bool, bool], Callable[..., grpc.RpcMethodHandler[Any, Any]]] = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    behaviour = _streaming(invoker, method) if method.server_streaming else _unary(invoker, method)
    return makers[method.client_streaming, method.server_streaming](
        behaviour,
        request_deserializer=method.request_class.FromString,
        response_serializer=_serialize,
    )


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


def _unary(invoker: Invoker, method: Method) -> Callable[[Any, Any], Any]:
    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Message:
        try:
            return await invoker.unary(method.path, request, context)
        except FleetError as error:
            await _abort(context, error)

    return call


def _streaming(invoker: Invoker, method: Method) -> Callable[[Any, Any], AsyncIterator[Message]]:
    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Message]:
        try:
            async with aclosing(invoker.stream(method.path, request, context)) as replies:
                async for reply in replies:
                    yield reply
        except FleetError as error:
            await _abort(context, error)

    return call


async def _abort(context: grpc.aio.ServicerContext[Any, Any], error: FleetError) -> NoReturn:
    request_id = read_metadata(context).get("x-request-id", "")
    status = rich_status(error, request_id)
    trailers = ((DETAILS_KEY, status.SerializeToString()),)
    await context.abort(grpc_code(error), status.message, trailing_metadata=trailers)
    raise AssertionError("abort always raises")
