"""Who may call: the fleet's keys, as X-API-Key, Bearer or the password of HTTP Basic, for HTTP and WebSockets alike."""

from __future__ import annotations

import base64
import binascii
import contextlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from fleet_server.comfy.replies import refused
from fleet_server.domain.errors import FleetError
from fleet_server.services.comfy_prompts import Who


class Keys(Protocol):
    """The keys of this server: rpc.auth."""

    def owner(self, key: str | None, peer: str) -> str:
        """Whose key it is, "" without keys. Raises API_KEY_MISSING, API_KEY_INVALID, RATE_LIMITED."""
        ...

    def is_admin(self, owner: str) -> bool:
        """Whether they may everything."""
        ...

    def watching(self, key: str | None, tell: Any) -> AbstractContextManager[None]:
        """Calls `tell` where the key is withdrawn meanwhile."""
        ...


class Posture:
    """Lets in who has a key; says in the scope who that is (`fleet_who`, `fleet_key`)."""

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        key = key_of(headers)
        client = scope.get("client")
        address = client[0] if client else ""
        try:
            owner = self._keys.owner(key, f"ipv4:{address}:{client[1]}" if client else "")
        except FleetError as error:
            await _refuse(error, scope, receive, send)
            return
        scope["fleet_who"] = Who(owner, self._keys.is_admin(owner), address)
        scope["fleet_key"] = key
        await self._app(scope, receive, send)


def key_of(headers: Mapping[str, str]) -> str | None:
    """The key that a request brings; of HTTP Basic it is the password, whatever the name."""
    key = headers.get("x-api-key")
    if key is not None:
        return key
    scheme, _, rest = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return rest.strip()
    if scheme.lower() == "basic":
        with contextlib.suppress(binascii.Error, UnicodeDecodeError):
            return base64.b64decode(rest.strip(), validate=True).decode().partition(":")[2]
    return None


async def _refuse(error: FleetError, scope: Scope, receive: Receive, send: Send) -> None:
    reply: Response = refused(error)
    if reply.status_code == 401:
        # Browsers ask for the password then.
        reply.headers["www-authenticate"] = 'Basic realm="Fleet Commander", charset="UTF-8"'
    if scope["type"] == "http":
        await reply(scope, receive, send)
        return
    await receive()  # websocket.connect
    if "websocket.http.response" not in scope.get("extensions", {}):
        await send({"type": "websocket.close"})
        return
    kind = "websocket.http.response"
    await send({"type": f"{kind}.start", "status": reply.status_code, "headers": reply.raw_headers})
    await send({"type": f"{kind}.body", "body": reply.body})
