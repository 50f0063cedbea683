"""Which inputs are still needed: those that ComfyUI prompts name which have not ended."""

from __future__ import annotations

from collections.abc import Iterator

from fleet.v1 import types_pb2

from fleet_server.domain.job import JobRecord
from fleet_server.store import Store

_BATCH = 100
_SCHEME = "input:"


async def needed_inputs(store: Store) -> set[str]:
    """Their ids. Raises STORE_UNAVAILABLE."""
    job_ids = [job_id for job_id, _ in await store.comfy.open()]
    found: set[str] = set()
    for start in range(0, len(job_ids), _BATCH):
        for record in await store.jobs.get_many(job_ids[start : start + _BATCH]):
            if record is not None and not record.state.ended:
                found.update(_inputs_of(record))
    return found


def _inputs_of(record: JobRecord) -> Iterator[str]:
    spec = types_pb2.JobSpec.FromString(record.spec)
    for one in spec.payload.workflow.inputs:
        if one.reference.startswith(_SCHEME):
            yield one.reference.removeprefix(_SCHEME)
