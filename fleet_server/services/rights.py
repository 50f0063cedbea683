"""Which files a node may read: those of the jobs that it holds, and models."""

from __future__ import annotations

import structlog
from fleet.v1 import node_pb2
from fleet.v1.types_pb2 import JobSpec

from fleet_server.domain.errors import FleetError
from fleet_server.services.inputs import InputResolver, has_inputs
from fleet_server.services.references import parse
from fleet_server.services.refusals import forbidden
from fleet_server.storage.buckets import LORAS, MODELS
from fleet_server.store import JobStore

_log = structlog.get_logger("fleet.rights")


class NodeRights:
    """Asked at each file that an agent with a certificate reads. What a job reads is looked up in the store: any
    replica answers alike, after a restart too."""

    def __init__(self, jobs: JobStore, inputs: InputResolver) -> None:
        self._jobs = jobs
        self._inputs = inputs

    async def check(self, node_id: str, reference: str) -> None:
        """Raises NODE_FORBIDDEN for a file that the node has no business with, STORE_UNAVAILABLE."""
        read = parse(reference)
        if read is not None and read.kind == "s3" and read.bucket in (MODELS, LORAS):
            return
        held = await self._jobs.held_by(node_id)
        for record in await self._jobs.get_many(list(held.values())):
            if record is None or held.get(record.token) != record.job_id:
                continue
            payload = JobSpec.FromString(record.spec).payload
            if has_inputs(payload):
                try:
                    files = await self._inputs.resolve(payload)
                except FleetError as error:
                    if error.reason == "STORE_UNAVAILABLE":
                        raise
                    continue
                if reference in {_asked(one) for one in files}:
                    return
        _log.warning("an agent asked for a file that none of its jobs reads", node_id=node_id)
        raise forbidden("reference: an agent reads only the files that its jobs need")


def _asked(one: node_pb2.AssignedInput) -> str:
    """What the agent reads an input by: outputs by their names, also those that a job: stands for."""
    return one.reference if one.reference.startswith(("input:", "s3://")) else f"output:{one.filename}"
