"""/ws: a client's socket from its handshake to its end."""

from __future__ import annotations

import contextlib
import uuid

import orjson
from starlette.websockets import WebSocket

from fleet_server.comfy.parts import ComfyParts
from fleet_server.comfy.posture import Keys
from fleet_server.comfy.sockets import status_text
from fleet_server.domain.errors import FleetError
from fleet_server.services.comfy_prompts import Who

_MOST = 256
_TOO_MANY = 1013
_NOT_HERE = frozenset({"assets"})


class SocketRoutes:
    """See `ws`."""

    def __init__(self, parts: ComfyParts, keys: Keys) -> None:
        self._parts = parts
        self._keys = keys

    async def ws(self, websocket: WebSocket) -> None:
        """Serves a client: what it is told first is what it missed."""
        parts = self._parts
        who: Who = websocket.scope["fleet_who"]
        client_id = websocket.query_params.get("clientId") or uuid.uuid4().hex
        await websocket.accept()
        if len(client_id) > _MOST or parts.sockets.full:
            await websocket.close(_TOO_MANY)
            return
        socket = parts.sockets.open(websocket, who, client_id, self._features())
        try:
            with self._keys.watching(websocket.scope["fleet_key"], lambda: parts.sockets.withdrawn(socket)):
                socket.put(status_text(parts.tracker.remaining, client_id))
                for live in parts.tracker.lives():
                    if (live.owner, live.client_id) == (who.owner, client_id):
                        for text in live.replay():
                            socket.put(text)
                # What the store cannot say now is told when the client comes again.
                with contextlib.suppress(FleetError):
                    await parts.tracker.missed(who.owner, client_id)
                await socket.run()
        finally:
            parts.sockets.leave(socket)

    def _features(self) -> bytes:
        return orjson.dumps(features(self._parts))


def features(parts: ComfyParts) -> dict[str, object]:
    """What a node's ComfyUI supports, but for its limit, which is ours, and what has no routes here."""
    told = {name: value for name, value in parts.nodes.features().items() if name not in _NOT_HERE}
    return {**told, "supports_preview_metadata": True, "max_upload_size": parts.settings.upload_bytes}
