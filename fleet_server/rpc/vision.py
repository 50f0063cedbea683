"""fleet.v1.Vision."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import grpc
from fleet.v1 import types_pb2, vision_pb2
from google.api import httpbody_pb2

from fleet_server.rpc.caller import caller_of, idempotency_key
from fleet_server.rpc.models import ModelCalls
from fleet_server.rpc.outputs import OneOutputCalls
from fleet_server.services.gallery import Gallery
from fleet_server.services.model_desk import ModelDesk
from fleet_server.services.models import ModelCatalog
from fleet_server.services.pages import page_by_name
from fleet_server.services.ports import Nodes
from fleet_server.services.queue import JobQueue
from fleet_server.services.reruns import Reruns

Context = grpc.aio.ServicerContext[Any, Any]
_CLUSTER = "vision"


class VisionServicer(OneOutputCalls, ModelCalls):
    """Pictures and models. Every method raises FleetError."""

    def __init__(
        self,
        queue: JobQueue,
        gallery: Gallery,
        reruns: Reruns,
        catalog: ModelCatalog,
        nodes: Nodes,
        models: ModelDesk,
    ) -> None:
        self._queue = queue
        self._gallery = gallery
        self._reruns = reruns
        self._catalog = catalog
        self._nodes = nodes
        self._models = models

    async def Generate(
        self, request: vision_pb2.VisionGenerateRequest, context: Context
    ) -> vision_pb2.VisionGenerateResponse:
        key = idempotency_key(context, request)
        receipt = await self._queue.create_image(request, owner=caller_of(context).owner, key=key)
        return vision_pb2.VisionGenerateResponse(receipt=receipt)

    async def ListNodes(
        self, request: vision_pb2.VisionListNodesRequest, context: Context
    ) -> vision_pb2.VisionListNodesResponse:
        names = [node.node_id for node in self._nodes.nodes() if _CLUSTER in node.clusters]
        found = [info for info in map(self._nodes.info, names) if info is not None]
        if request.status:
            found = [info for info in found if info.status in request.status]
        nodes, token = page_by_name(request, found, lambda info: (info.node_id,))
        return vision_pb2.VisionListNodesResponse(nodes=nodes, next_page_token=token)

    async def ListGallery(
        self, request: vision_pb2.ListGalleryRequest, context: Context
    ) -> vision_pb2.ListGalleryResponse:
        images, token = await self._gallery.list(request)
        return vision_pb2.ListGalleryResponse(images=images, next_page_token=token)

    async def GetOutput(
        self, request: vision_pb2.GetOutputRequest, context: Context
    ) -> AsyncGenerator[httpbody_pb2.HttpBody, None]:
        width = request.width if request.HasField("width") else None
        download = await self._gallery.download(request.filename, width=width, headers=caller_of(context).metadata)
        await context.send_initial_metadata((*download.headers, ("x-http-status", str(download.status))))
        content_type = download.content_type
        async with aclosing(download.chunks()) as chunks:
            async for chunk in chunks:
                yield httpbody_pb2.HttpBody(content_type=content_type, data=chunk)
                content_type = ""

    async def ListModels(
        self, request: vision_pb2.ListModelsRequest, context: Context
    ) -> vision_pb2.ListModelsResponse:
        found = self._catalog.models(
            job_type=request.job_type if request.HasField("job_type") else None,
            node_id=request.node_id if request.HasField("node_id") else None,
        )
        models, token = page_by_name(request, found, lambda model: (model.name,))
        return vision_pb2.ListModelsResponse(models=models, next_page_token=token)

    async def ListLoadedModels(
        self, request: vision_pb2.ListLoadedModelsRequest, context: Context
    ) -> vision_pb2.ListLoadedModelsResponse:
        running = await self._queue.running_models(self._running())
        node_id = request.node_id if request.HasField("node_id") else None
        found = self._catalog.loaded(node_id=node_id, running=running)
        models, token = page_by_name(request, found, lambda model: (model.node_id, model.name))
        return vision_pb2.ListLoadedModelsResponse(models=models, next_page_token=token)

    def _running(self) -> list[str]:
        infos: list[types_pb2.NodeInfo | None] = [self._nodes.info(node.node_id) for node in self._nodes.online()]
        return [job_id for info in infos if info is not None for job_id in info.running_job_ids]

    async def ListLoras(self, request: vision_pb2.ListLorasRequest, context: Context) -> vision_pb2.ListLorasResponse:
        found = self._catalog.loras(node_id=request.node_id if request.HasField("node_id") else None)
        loras, token = page_by_name(request, found, lambda lora: (lora.name,))
        return vision_pb2.ListLorasResponse(loras=loras, next_page_token=token)
