"""The HTTP routes that no RPC stands behind: the front page, the documents, the metrics. Each says why."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from fleet_server.bridge.special import SpecialRoute

Authenticate = Callable[[dict[str, str], str], object]
_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Fleet Commander</title>
<style>
  :root {{ color-scheme: light dark; font: 17px/1.6 system-ui, sans-serif; }}
  body {{ max-width: 38rem; margin: 12vh auto; padding: 0 1.5rem; }}
  pre {{ padding: 1rem; overflow-x: auto; border-radius: .5rem; background: #8882; font-size: .8rem; }}
</style>
<h1>Fleet Commander</h1>
<p>Version {version}. One address for all your GPU nodes.</p>
<pre>curl -X POST "{origin}/api/fleet/generate" \\
  -H "Content-Type: application/json" \\
  -d '{{"prompt": "a beautiful sunset over mountains"}}' --output image.png</pre>
<p><a href="/docs">Every call, with a form to try it</a> · <a href="/openapi.json">OpenAPI</a> ·
<a href="/api/status">Status</a> · <a href="/metrics">Metrics</a></p>
</html>
"""


def front_page(version: str, origin: str) -> SpecialRoute:
    """`/`: where a person lands who types the address into a browser."""
    body = _PAGE.format(version=version, origin=origin).encode()
    return SpecialRoute("GET", "/", _bytes(lambda: body, "text/html; charset=utf-8"), "a page for people")


def metrics(registry: CollectorRegistry) -> SpecialRoute:
    """`/metrics`, as Prometheus reads it."""
    return SpecialRoute("GET", "/metrics", _bytes(lambda: generate_latest(registry), CONTENT_TYPE_LATEST), "metrics")


def guarded(routes: Iterable[SpecialRoute], authenticate: Authenticate) -> list[SpecialRoute]:
    """The routes, open to those alone whose key `authenticate(headers, peer)` accepts; it raises FleetError."""

    def guard(route: SpecialRoute) -> SpecialRoute:
        async def serve(scope: Any, receive: Any, send: Any) -> None:
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            client = scope.get("client")
            authenticate(headers, f"ipv4:{client[0]}:{client[1]}" if client else "")
            await route.handler(scope, receive, send)

        return SpecialRoute(route.method, route.path, serve, route.reason)

    return [guard(route) for route in routes]


def _bytes(body: Callable[[], bytes], content_type: str) -> Any:
    async def serve(scope: Any, receive: Any, send: Any) -> None:
        data = body()
        headers = [
            (b"content-type", content_type.encode()),
            (b"content-length", str(len(data)).encode()),
            (b"x-content-type-options", b"nosniff"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else data})

    return serve
