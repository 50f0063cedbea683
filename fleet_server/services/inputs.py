"""What references of a payload stand for, found when the job is given to a node."""

from __future__ import annotations

from collections.abc import Sequence

from fleet.v1 import node_pb2, types_pb2

from fleet_server.services.payloads import references_of
from fleet_server.services.references import parse
from fleet_server.services.refusals import refused
from fleet_server.store import JobStore, OutputStore


def has_inputs(payload: types_pb2.Payload) -> bool:
    """Whether the payload refers to files."""
    return any(True for _ in references_of(payload, path=""))


class InputResolver:
    """Makes the inputs of an Assign. A job that one refers to has succeeded by then: it waited for it."""

    def __init__(self, jobs: JobStore, outputs: OutputStore) -> None:
        self._jobs = jobs
        self._outputs = outputs

    async def resolve(self, payload: types_pb2.Payload) -> list[node_pb2.AssignedInput]:
        """The files of each reference, each reference once: all outputs of a job in a list, else the first.

        Raises INPUT_NOT_FOUND naming the field, STORE_UNAVAILABLE.
        """
        found: dict[str, list[node_pb2.AssignedInput]] = {}
        for path, reference in references_of(payload, path="payload"):
            if reference not in found:
                outputs = await self._outputs_of(reference, path)
                every = path.endswith("]")
                found[reference] = [_input(reference, output) for output in (outputs if every else outputs[:1])]
        return [one for files in found.values() for one in files]

    async def _outputs_of(self, text: str, path: str) -> Sequence[types_pb2.Output]:
        reference = parse(text)
        outputs: Sequence[types_pb2.Output] = ()
        if reference is not None and reference.kind == "output":
            row = await self._outputs.get(reference.name)
            outputs = () if row is None else (types_pb2.Output.FromString(row.record),)
        elif reference is not None and reference.kind == "job":
            outputs = await self._made_by(reference.name)
        if not outputs:
            raise refused("INPUT_NOT_FOUND", path, f"there is no file behind {text!r} any more")
        return outputs

    async def _made_by(self, job_id: str) -> list[types_pb2.Output]:
        """The outputs of a job, of a group those of its images in order."""
        record = await self._jobs.get(job_id)
        if record is None:
            return []
        makers = [record]
        if record.children:
            images = await self._jobs.get_many(types_pb2.JobSpec.FromString(record.spec).child_job_ids)
            makers = [image for image in images if image is not None]
        return [output for maker in makers for output in types_pb2.JobResult.FromString(maker.result).outputs]


def _input(reference: str, output: types_pb2.Output) -> node_pb2.AssignedInput:
    return node_pb2.AssignedInput(
        reference=reference,
        filename=output.filename,
        content_type=output.content_type,
        size_bytes=output.size_bytes,
        sha256=output.sha256,
    )
