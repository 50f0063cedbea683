"""Outputs made again, from the record of their making."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fleet.v1 import types_pb2, vision_pb2

from fleet_server.domain.errors import FleetError
from fleet_server.services.inputs import InputResolver
from fleet_server.services.models import ModelCatalog
from fleet_server.services.payloads import model_of, references_of
from fleet_server.services.queue import JobQueue
from fleet_server.services.refusals import refused
from fleet_server.services.words import type_word
from fleet_server.storage.names import is_output_name
from fleet_server.store import OutputRow, Store


class Reruns:
    """Makes jobs of records: the same payload, seed included, with the same model file, whatever it is called now."""

    def __init__(self, store: Store, queue: JobQueue, catalog: ModelCatalog, inputs: InputResolver) -> None:
        self._store = store
        self._queue = queue
        self._catalog = catalog
        self._inputs = inputs

    async def rerun(
        self,
        request: vision_pb2.RerunOutputRequest,
        *,
        owner: str,
        key: str | None,
        allowed: Callable[[int], None] = lambda _: None,
    ) -> types_pb2.Receipt:
        """The receipt of the new job. `allowed(job type)` raises where the caller may not submit such jobs.

        Raises OUTPUT_NOT_FOUND, NO_RECORD, MODEL_NOT_FOUND, INPUT_NOT_FOUND and what a submit does.
        """
        row = await self._store.outputs.get(request.filename) if is_output_name(request.filename) else None
        if row is None:
            raise FleetError("OUTPUT_NOT_FOUND", "filename: there is no such output; see GET /api/vision/gallery")
        spec = await self._spec(row)
        allowed(spec.job_type)
        spec.priority = request.priority
        await self._pin_references(spec.payload)
        self._pin_model(spec, types_pb2.Output.FromString(row.record).metadata)
        return await self._queue.create_again(spec, request, owner=owner, key=key)

    async def _spec(self, row: OutputRow) -> types_pb2.JobSpec:
        making = row.making
        if not making and row.job_id:
            record = await self._store.jobs.get(row.job_id)
            making = record.spec if record is not None else b""
        known = types_pb2.JobSpec.FromString(making)
        if known.payload.WhichOneof("kind") is None:
            raise FleetError("NO_RECORD", f"filename: how {row.filename} was made is not known: submit a job instead")
        return types_pb2.JobSpec(job_type=known.job_type, payload=known.payload, target_cluster=known.target_cluster)

    async def _pin_references(self, payload: types_pb2.Payload) -> None:
        """What was the output of another job is named itself: that job need not be there any more."""
        if not any(reference.startswith("job:") for _, reference in references_of(payload, path="")):
            return
        files = {one.reference: one.filename for one in await self._inputs.resolve(payload)}
        message = getattr(payload, payload.WhichOneof("kind") or "")
        for path, reference in list(references_of(payload, path="")):
            if reference.startswith("job:") and not path.endswith("]"):
                setattr(message, path, f"output:{files[reference]}")

    def _pin_model(self, spec: types_pb2.JobSpec, metadata: types_pb2.OutputMetadata) -> None:
        """The payload names the file that made the output, by its hash. Raises MODEL_NOT_FOUND where it is gone."""
        name, sha256 = model_of(spec.payload), metadata.model_sha256
        if name is None or not sha256:
            return
        files: dict[str, Any] = {model.name: model for model in self._catalog.models()}
        if not files:
            # No node is known: jobs wait for one, as any submit does.
            return
        if name in files and files[name].sha256 == sha256:
            return
        same = sorted(m.name for m in files.values() if m.sha256 == sha256 and not m.HasField("alias_of"))
        if not same:
            words = f"no node has the model file that made it any more: {name} with the hash {sha256[:12]}…"
            raise refused("MODEL_NOT_FOUND", "filename", words)
        getattr(spec.payload, type_word(spec.job_type)).model = same[0]
