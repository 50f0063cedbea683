"""What callers have nodes do with models: load, unload, pin, bring from S3."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol

from fleet.v1 import command_pb2, types_pb2, vision_pb2
from google.protobuf.message import Message

from fleet_server.domain.errors import FleetError
from fleet_server.domain.fetching import ShelfFile
from fleet_server.domain.node import NodeView
from fleet_server.services.bucket_shelf import BucketShelf
from fleet_server.services.fetches import Fetches, Runs, Tell
from fleet_server.services.intake import idempotency
from fleet_server.services.models import ModelCatalog
from fleet_server.services.ports import Nodes
from fleet_server.services.refusals import refused
from fleet_server.services.shield import Shield
from fleet_server.store import Idempotency

LOAD_SECONDS = 3_600.0
UNLOAD_SECONDS = 60.0
Work = Callable[[str], Awaitable[bytes]]


class Replies(Protocol):
    """What is asked of `ReplyStore`."""

    async def once(self, idempotency: Idempotency, work: Work) -> bytes: ...


class ModelDesk:
    """Every method raises FleetError. What was begun goes on when its caller leaves."""

    def __init__(
        self,
        nodes: Nodes,
        catalog: ModelCatalog,
        commands: Runs,
        shelf: BucketShelf,
        fetches: Fetches,
        replies: Replies,
        tell: Tell,
    ) -> None:
        self._nodes = nodes
        self._catalog = catalog
        self._commands = commands
        self._shelf = shelf
        self._fetches = fetches
        self._replies = replies
        self._tell = tell
        self._shield = Shield()

    async def aclose(self) -> None:
        """Waits for what is under way, not for long: nodes go on by themselves."""
        await self._shield.aclose(1.0)

    async def load(self, request: vision_pb2.LoadModelRequest, *, owner: str, key: str | None) -> types_pb2.LoadedModel:
        """Has the node load the model, bringing it from S3 first where it must.

        Raises NODE_NOT_FOUND, NODE_OFFLINE, MODEL_NOT_FOUND, OUT_OF_MEMORY and what bringing it raises.
        """

        async def work(operation: str) -> bytes:
            return (await self._load(request, operation, key)).SerializeToString()

        reply = await self._once(request, "Vision/LoadModel", owner, key, work)
        return types_pb2.LoadedModel.FromString(reply)

    async def unload(
        self, request: vision_pb2.UnloadModelRequest, *, owner: str, key: str | None
    ) -> types_pb2.LoadedModel:
        """Has the node forget the model, pinned or not; the model as it was. Raises as `load` does."""

        async def work(operation: str) -> bytes:
            return (await self._unload(request, operation)).SerializeToString()

        reply = await self._once(request, "Vision/UnloadModel", owner, key, work)
        return types_pb2.LoadedModel.FromString(reply)

    async def download(
        self, request: vision_pb2.DownloadModelRequest, *, owner: str, key: str | None
    ) -> vision_pb2.DownloadModelResponse:
        """Has each node bring the file; what became of it on each, in the order asked for.

        Raises NODE_NOT_FOUND, MODEL_NOT_FOUND (no such file in S3), S3_UNAVAILABLE.
        """

        async def work(operation: str) -> bytes:
            return (await self._download(request, key)).SerializeToString()

        reply = await self._once(request, "Vision/DownloadModel", owner, key, work)
        return vision_pb2.DownloadModelResponse.FromString(reply)

    async def _once(self, request: Message, method: str, owner: str, key: str | None, work: Work) -> bytes:
        once = idempotency(request, method=method, owner=owner, key=key)
        if once is None:
            return await self._shield.run(_plainly(work))
        return await self._shield.run(self._replies.once(once, work))

    async def _load(
        self, request: vision_pb2.LoadModelRequest, operation: str, key: str | None
    ) -> types_pb2.LoadedModel:
        node = self._node(request.node_id)
        name = self._catalog.real_name(request.model, node)
        file = node.models.get(name)
        if file is None or file.kind != "checkpoint":
            await self._fetches.bring(node.node_id, self._in_s3(request.model, name, node), key)
        asked = vision_pb2.LoadModelRequest(node_id=node.node_id, model=name, pin=request.pin)
        command = command_pb2.Command(command_id=operation, load_model=asked)
        last = types_pb2.OperationProgress(
            operation="model_load", request_id=key, node_id=node.node_id, name=request.model, progress=100
        )

        def heard(progress: types_pb2.OperationProgress) -> None:
            progress.name = request.model
            if key is not None:
                progress.request_id = key
            self._tell(progress)

        try:
            end = await self._commands.run(node.node_id, command, timeout=LOAD_SECONDS, progress=heard)
            last.message = "loaded"
        except FleetError as error:
            last.message = f"failed: {error.detail}"
            raise
        finally:
            self._tell(last)
        return _named(end.loaded_model, request.model, name)

    def _in_s3(self, asked: str, name: str, node: NodeView) -> ShelfFile:
        found = self._shelf.find("checkpoint", name)
        if found is None:
            words = f"{node.node_id} has no model {asked!r}, nor has S3; see GET /api/vision/models/available"
            raise refused("MODEL_NOT_FOUND", "model", words)
        return found

    async def _unload(self, request: vision_pb2.UnloadModelRequest, operation: str) -> types_pb2.LoadedModel:
        node = self._node(request.node_id)
        name = self._catalog.real_name(request.model, node)
        asked = vision_pb2.UnloadModelRequest(node_id=node.node_id, model=name)
        command = command_pb2.Command(command_id=operation, unload_model=asked)
        end = await self._commands.run(node.node_id, command, timeout=UNLOAD_SECONDS)
        return _named(end.loaded_model, request.model, name)

    async def _download(
        self, request: vision_pb2.DownloadModelRequest, key: str | None
    ) -> vision_pb2.DownloadModelResponse:
        node_ids = list(dict.fromkeys(request.node_ids))
        for index, node_id in enumerate(node_ids):
            if self._nodes.node(node_id) is None:
                raise refused(
                    "NODE_NOT_FOUND", f"node_ids[{index}]", f"there is no node {node_id!r}; see GET /api/nodes"
                )
        file = await self._shelf.look_up(request.name)
        if file is None:
            words = f"neither fleet-models nor fleet-loras has {request.name!r}: put it there first"
            raise refused("MODEL_NOT_FOUND", "name", words)
        downloads = await asyncio.gather(*(self._brought(node_id, file, key) for node_id in node_ids))
        return vision_pb2.DownloadModelResponse(name=request.name, downloads=downloads)

    async def _brought(self, node_id: str, file: ShelfFile, key: str | None) -> vision_pb2.ModelDownload:
        try:
            brought = await self._fetches.bring(node_id, file, key)
        except FleetError as error:
            detail = f"{error.reason}: {error.detail}"
            return vision_pb2.ModelDownload(node_id=node_id, status="failed", detail=detail)
        result = vision_pb2.ModelDownload(node_id=node_id, status=brought.status)
        result.size_bytes = brought.size_bytes
        return result

    def _node(self, node_id: str) -> NodeView:
        node = self._nodes.node(node_id)
        if node is None:
            raise refused("NODE_NOT_FOUND", "node_id", f"there is no node {node_id!r}; see GET /api/nodes")
        if not node.online:
            words = f"{node_id} is {node.status.value}: start its agent, or name another node"
            raise refused("NODE_OFFLINE", "node_id", words)
        return node


async def _plainly(work: Work) -> bytes:
    return await work("")


def _named(loaded: types_pb2.LoadedModel, asked: str, real: str) -> types_pb2.LoadedModel:
    """The model under the name that the caller used."""
    if asked != real:
        loaded.name, loaded.alias_of = asked, real
    return loaded
