"""The bridge: HTTP and WebSockets to the methods of services, by their google.api.http rules."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Final
from urllib.parse import quote

import uuid_utils
from google.protobuf.descriptor import ServiceDescriptor

from fleet_server.bridge.asgi import HEAD_EXTENSION, LINE_EXTENSION, Call, Receive, Scope, Send
from fleet_server.bridge.context import InProcContext, parse_timeout
from fleet_server.bridge.endpoint import Endpoint
from fleet_server.bridge.httprule import HTTP_BODY, WEBSOCKET, Binding, rules_of
from fleet_server.bridge.invoker import Invoker
from fleet_server.bridge.replies import SharedEncodings
from fleet_server.bridge.routes import RouteError, Router
from fleet_server.bridge.settings import BridgeSettings
from fleet_server.bridge.special import SpecialRoute, SpecialRoutes, serve_special
from fleet_server.bridge.supervise import LiveCalls
from fleet_server.bridge.websocket import refuse
from fleet_server.domain.errors import FleetError
from fleet_server.protojson import JsonCodec

_LOG = logging.getLogger(__name__)
_REQUEST_ID: Final = re.compile(rb"[!-~]{1,128}")


class Bridge:
    """A raw ASGI application (http and websocket; no lifespan) in front of grpc.aio servicers in this process.

    `services` are served as their http rules say; `special` are the literal routes beside them; `required_paths`
    ("GET /api/nodes/{node_id}") must each be answered. Raises RouteError, HttpRuleError or TemplateError, naming what
    is wrong, where rules are malformed, shadow each other or leave a required path out.

    Every reply carries X-Request-Id, the caller's where it is 1 to 128 visible ASCII characters, else a new UUIDv7.
    """

    def __init__(
        self,
        services: Iterable[ServiceDescriptor],
        invoker: Invoker,
        codec: JsonCodec | None = None,
        *,
        special: Iterable[SpecialRoute] = (),
        required_paths: Iterable[str] = (),
        settings: BridgeSettings | None = None,
    ) -> None:
        codec = codec if codec is not None else JsonCodec()
        settings = settings if settings is not None else BridgeSettings()
        self._settings = settings
        self._special = SpecialRoutes(special)
        self._live = LiveCalls()
        shared = SharedEncodings()
        self.bindings: tuple[Binding, ...] = tuple(
            binding for service in services for method in service.methods for binding in rules_of(method)
        )
        codec.prepare(
            kind
            for binding in self.bindings
            for kind in (binding.method.input_type, binding.method.output_type)
            if kind.full_name != HTTP_BODY
        )
        for route in self._special:
            for binding in self.bindings:
                if binding.template.literal_path == route.path:
                    raise RouteError(f"{binding} is shadowed by the special route {route}; change one of them")
        self._router: Router[Endpoint] = Router(
            self.bindings,
            lambda binding: Endpoint(binding, invoker, codec, settings, shared, self._live),
            required=required_paths,
            specials=[f"{route.method} {route.path}" for route in self._special],
        )

    @property
    def live_streams(self) -> int:
        """Streams and WebSockets in progress."""
        return len(self._live)

    async def shut_down(self) -> None:
        """End all streams (last message: the SHUTTING_DOWN error) and WebSockets (1001); refuse new ones.

        Waits for them, at most `send_seconds`. To be called before the HTTP server stops.
        """
        await self._live.shut_down(self._settings.send_seconds)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "websocket":
            await self._serve_websocket(scope, receive, send)
            return
        if scope["type"] != "http":
            raise RuntimeError(f"the bridge serves http and websocket, not {scope['type']}; turn lifespan off")
        extensions = scope.get("extensions") or {}
        known = extensions.get(HEAD_EXTENSION)
        headers = dict(scope["headers"]) if known is None else known.fields
        call = Call(scope, receive, send, headers, _request_id(headers))
        line = extensions.get(LINE_EXTENSION)
        route = None if line is None else line.notes.get(self)
        try:
            if route is None:
                raw_path = _raw_path(scope)
                special = self._special.at(raw_path)
                if special is not None:
                    await serve_special(special, call)
                    return
                route = self._router.match(scope["method"], raw_path)
                if line is not None:
                    line.notes[self] = route
            endpoint, variables = route
            context = InProcContext(scope, call.request_id, _timeout(headers))
            await endpoint.serve(call, context, variables)
        except FleetError as error:
            await call.fail(error)
        except Exception:
            _LOG.exception("the bridge failed on request %s", call.request_id)
            if call.started:
                raise
            await call.fail(_internal())

    async def _serve_websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        call = Call(scope, receive, send, headers, _request_id(headers))
        await receive()  # websocket.connect
        try:
            endpoint, variables = self._router.match(WEBSOCKET, _raw_path(scope))
            context = InProcContext(scope, call.request_id, _timeout(headers))
            await endpoint.serve_socket(call, context, variables)
        except FleetError as error:
            await refuse(call, error)
        except Exception:
            _LOG.exception("the bridge failed on request %s", call.request_id)
            if call.started:
                raise
            await refuse(call, _internal())


def _raw_path(scope: Scope) -> bytes:
    raw: bytes | None = scope.get("raw_path")
    return raw if raw is not None else quote(scope["path"]).encode()


def _timeout(headers: Mapping[bytes, bytes]) -> float | None:
    value = headers.get(b"grpc-timeout")
    return None if value is None else parse_timeout(value)


def _request_id(headers: Mapping[bytes, bytes]) -> str:
    given = headers.get(b"x-request-id")
    if given is not None and _REQUEST_ID.fullmatch(given):
        return given.decode("ascii")
    return str(uuid_utils.uuid7())


def _internal() -> FleetError:
    return FleetError("INTERNAL", "the server failed on this call; its log has the request id")
