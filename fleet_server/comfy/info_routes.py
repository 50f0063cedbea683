"""object_info, models, embeddings, system_stats, features, free: what the whole fleet has."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import quote, urlencode

from starlette.requests import Request
from starlette.responses import Response

from fleet_server.comfy.parts import ComfyParts
from fleet_server.comfy.replies import body_of, empty, json_bytes, json_reply, who_of
from fleet_server.comfy.socket_routes import features
from fleet_server.domain.errors import FleetError

Json = Any


class InfoRoutes:
    """Each method is one route. All but view_metadata answer with every node stopped."""

    def __init__(self, parts: ComfyParts) -> None:
        self._parts = parts
        self._nodes = parts.nodes

    async def object_info(self, request: Request) -> Response:
        return json_bytes(await self._nodes.object_info(request.path_params.get("name")))

    async def models(self, request: Request) -> Response:
        return json_reply(self._nodes.folders())

    async def models_of(self, request: Request) -> Response:
        found = self._nodes.models(request.path_params["folder"])
        return empty(404) if found is None else json_reply(found)

    async def embeddings(self, request: Request) -> Response:
        return json_reply(self._nodes.embeddings())

    async def features(self, request: Request) -> Response:
        return json_reply(features(self._parts))

    async def system_stats(self, request: Request) -> Response:
        """One machine with the devices of all nodes; what does not answer in time is as it was last."""
        node_ids = self._nodes.node_ids()
        found = await asyncio.gather(*(self._stats(node_id) for node_id in node_ids))
        known = [(node_id, stats) for node_id, stats in zip(node_ids, found, strict=True) if stats]
        if not known:
            return json_reply({"system": {}, "devices": []})
        devices = [
            {**device, "name": f"{node_id}: {device.get('name')}"} if len(known) > 1 else device
            for node_id, stats in known
            for device in stats.get("devices", [])
        ]
        return json_reply({"system": known[0][1].get("system", {}), "devices": devices})

    async def _stats(self, node_id: str) -> dict[str, Json] | None:
        if node_id in self._nodes.online():
            try:
                async with asyncio.timeout(self._parts.settings.stats_seconds):
                    found = await self._nodes.get(node_id, "/system_stats")
                if isinstance(found, dict):
                    return found
            except (FleetError, TimeoutError):
                pass
        return self._nodes.stats(node_id)

    async def view_metadata(self, request: Request) -> Response:
        """Of the first node that has the file."""
        folder, query = quote(request.path_params["folder"], safe=""), urlencode(request.query_params.multi_items())
        for node_id in self._nodes.online():
            try:
                found = await self._nodes.get(node_id, f"/view_metadata/{folder}?{query}")
            except FleetError:
                continue
            if found is not None:
                return json_reply(found)
        return empty(404)

    async def free(self, request: Request) -> Response:
        """All nodes free memory; with keys this is for admins, as the models are everybody's."""
        body = await body_of(request, self._parts.settings.body_bytes)
        if not who_of(request).admin:
            raise FleetError("SCOPE_MISSING", "freeing the nodes' memory is for admin keys: the models are everybody's")
        await asyncio.gather(*(self._free(node_id, body) for node_id in self._nodes.online()))
        return empty()

    async def _free(self, node_id: str, body: bytes) -> None:
        try:
            async with self._nodes.ask(node_id, "POST", "/free", body=body, content_type="application/json"):
                return
        except FleetError:
            return
