"""fleet.v1.Vision: what concerns models."""

from __future__ import annotations

from typing import Any

import grpc
from fleet.v1 import vision_pb2

from fleet_server.rpc.caller import caller_of, idempotency_key
from fleet_server.services.model_desk import ModelDesk

Context = grpc.aio.ServicerContext[Any, Any]


class ModelCalls:
    """Loading, unloading and bringing of models. Every method raises FleetError."""

    _models: ModelDesk

    async def LoadModel(self, request: vision_pb2.LoadModelRequest, context: Context) -> vision_pb2.LoadModelResponse:
        key = idempotency_key(context, request)
        loaded = await self._models.load(request, owner=caller_of(context).owner, key=key)
        return vision_pb2.LoadModelResponse(loaded_model=loaded)

    async def UnloadModel(
        self, request: vision_pb2.UnloadModelRequest, context: Context
    ) -> vision_pb2.UnloadModelResponse:
        key = idempotency_key(context, request)
        loaded = await self._models.unload(request, owner=caller_of(context).owner, key=key)
        return vision_pb2.UnloadModelResponse(loaded_model=loaded)

    async def DownloadModel(
        self, request: vision_pb2.DownloadModelRequest, context: Context
    ) -> vision_pb2.DownloadModelResponse:
        key = idempotency_key(context, request)
        return await self._models.download(request, owner=caller_of(context).owner, key=key)
