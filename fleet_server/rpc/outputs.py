"""The calls about files: of Fleet about all outputs and inputs, of Vision about one output, of Node to read them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import grpc
from fleet.v1 import command_pb2, fleet_pb2, vision_pb2

from fleet_server.rpc.caller import caller_of, idempotency_key
from fleet_server.rpc.machines import MachineParts
from fleet_server.rpc.scopes import check_job_type
from fleet_server.services.file_reader import FileReader
from fleet_server.services.gallery import Gallery
from fleet_server.services.input_uploads import InputUploads
from fleet_server.services.output_lists import OutputLists
from fleet_server.services.reruns import Reruns
from fleet_server.services.sweep_calls import SweepCalls

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True)
class OutputParts:
    """What `OutputCalls` need."""

    sweeps: SweepCalls
    lists: OutputLists
    inputs: InputUploads


class OutputCalls:
    """Outputs as a whole: where they are, and that they get there; inputs. Every method raises FleetError."""

    _outputs: OutputParts

    async def GetOutputStats(
        self, request: fleet_pb2.GetOutputStatsRequest, context: Context
    ) -> fleet_pb2.GetOutputStatsResponse:
        return await self._outputs.sweeps.stats()

    async def ListOutputs(
        self, request: fleet_pb2.ListOutputsRequest, context: Context
    ) -> fleet_pb2.ListOutputsResponse:
        outputs, token = await self._outputs.lists.page(request)
        return fleet_pb2.ListOutputsResponse(outputs=outputs, next_page_token=token)

    async def SyncOutputs(
        self, request: fleet_pb2.SyncOutputsRequest, context: Context
    ) -> fleet_pb2.SyncOutputsResponse:
        owner, key = caller_of(context).owner, idempotency_key(context, request)
        return fleet_pb2.SyncOutputsResponse(sweep=await self._outputs.sweeps.sync(request, owner=owner, key=key))

    async def CleanupOutputs(
        self, request: fleet_pb2.CleanupOutputsRequest, context: Context
    ) -> fleet_pb2.CleanupOutputsResponse:
        owner, key = caller_of(context).owner, idempotency_key(context, request)
        return fleet_pb2.CleanupOutputsResponse(sweep=await self._outputs.sweeps.cleanup(request, owner=owner, key=key))

    async def MoveOutputs(
        self, request: fleet_pb2.MoveOutputsRequest, context: Context
    ) -> fleet_pb2.MoveOutputsResponse:
        owner, key = caller_of(context).owner, idempotency_key(context, request)
        return fleet_pb2.MoveOutputsResponse(sweep=await self._outputs.sweeps.move(request, owner=owner, key=key))

    async def UploadInput(
        self, request_iterator: AsyncIterator[fleet_pb2.UploadInputRequest], context: Context
    ) -> fleet_pb2.UploadInputResponse:
        return await self._outputs.inputs.receive(request_iterator)


class FileCalls:
    """Files for agents. Every method raises FleetError."""

    _reader: FileReader
    _parts: MachineParts

    async def ReadFile(
        self, request: command_pb2.ReadFileRequest, context: Context
    ) -> AsyncGenerator[command_pb2.ReadFileResponse, None]:
        node_id = caller_of(context).node_id
        if node_id:
            await self._parts.rights.check(node_id, request.reference)
        async with aclosing(self._reader.read(request)) as parts:
            async for part in parts:
                yield part


class OneOutputCalls:
    """One output. Every method raises FleetError."""

    _gallery: Gallery
    _reruns: Reruns

    async def DeleteOutput(
        self, request: vision_pb2.DeleteOutputRequest, context: Context
    ) -> vision_pb2.DeleteOutputResponse:
        removal = await self._gallery.delete(request.filename)
        return vision_pb2.DeleteOutputResponse(
            filename=request.filename, removed=removal.removed, pending=removal.pending
        )

    async def GetOutputMetadata(
        self, request: vision_pb2.GetOutputMetadataRequest, context: Context
    ) -> vision_pb2.GetOutputMetadataResponse:
        return vision_pb2.GetOutputMetadataResponse(output=await self._gallery.output(request.filename))

    async def UpdateOutput(
        self, request: vision_pb2.UpdateOutputRequest, context: Context
    ) -> vision_pb2.UpdateOutputResponse:
        return vision_pb2.UpdateOutputResponse(output=await self._gallery.star(request.filename, request.starred))

    async def RerunOutput(
        self, request: vision_pb2.RerunOutputRequest, context: Context
    ) -> vision_pb2.RerunOutputResponse:
        caller, key = caller_of(context), idempotency_key(context, request)
        receipt = await self._reruns.rerun(
            request,
            owner=caller.owner,
            key=key,
            allowed=lambda job_type: check_job_type(job_type, admin=caller.admin, field="filename"),
        )
        return vision_pb2.RerunOutputResponse(receipt=receipt)
