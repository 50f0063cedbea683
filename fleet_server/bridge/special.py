"""Routes that no method stands behind, each with its reason: pages, documents, metrics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from fleet_server.bridge.asgi import ASGIApp, Call
from fleet_server.bridge.errors import MethodNotAllowedError
from fleet_server.bridge.routes import RouteError


@dataclass(frozen=True, slots=True)
class SpecialRoute:
    """A literal path that an ASGI handler answers, and why it is no method of a service.

    HEAD is served where the method is GET; X-Request-Id is added to the reply.
    """

    method: str
    path: str
    handler: ASGIApp
    reason: str

    def __str__(self) -> str:
        return f"{self.method} {self.path} ({self.reason})"


class SpecialRoutes:
    """The special routes by path. Raises RouteError where one is double, not literal or without a reason."""

    def __init__(self, routes: Iterable[SpecialRoute]) -> None:
        self._paths: dict[bytes, dict[str, SpecialRoute]] = {}
        for route in routes:
            if not route.path.startswith("/") or set(route.path) & set("{}*%?#"):
                raise RouteError(f"{route}: the path must be literal and begin with '/'")
            if not route.reason:
                raise RouteError(f"{route}: a special route needs a reason")
            methods = self._paths.setdefault(route.path.encode(), {})
            if route.method in methods:
                raise RouteError(f"{route} and {methods[route.method]} answer the same path")
            methods[route.method] = route

    def at(self, raw_path: bytes) -> Mapping[str, SpecialRoute] | None:
        """The routes of a path by method, None where there are none."""
        return self._paths.get(raw_path)

    def __iter__(self) -> Iterator[SpecialRoute]:
        for methods in self._paths.values():
            yield from methods.values()


async def serve_special(routes: Mapping[str, SpecialRoute], call: Call) -> None:
    """Answer a request by its special route. Raises MethodNotAllowedError."""
    method = "GET" if call.is_head and "HEAD" not in routes else call.scope["method"]
    route = routes.get(method)
    if route is None:
        allow = ", ".join(sorted({*routes, *(["HEAD"] if "GET" in routes else [])}))
        path = call.scope["path"]
        raise MethodNotAllowedError(f"{path} does not take {call.scope['method']}; it takes {allow}", allow)

    async def send(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            headers = [*message.get("headers", ()), (b"x-request-id", call.request_id.encode())]
            message = {**message, "headers": headers}
        elif call.is_head and message["type"] == "http.response.body":
            message = {**message, "body": b""}
        await call.send(message)

    await route.handler(call.scope, call.receive, send)
