"""What references of a payload stand for, found when the job is given to a node."""

from __future__ import annotations

from fleet.v1 import node_pb2, types_pb2

from fleet_server.services.payloads import references_of
from fleet_server.services.references import parse
from fleet_server.services.refusals import refused
from fleet_server.storage.s3 import S3Store
from fleet_server.store import InputStore, JobStore, OutputStore


def has_inputs(payload: types_pb2.Payload) -> bool:
    """Whether the payload refers to files."""
    return any(True for _ in references_of(payload, path=""))


class InputResolver:
    """Makes the inputs of an Assign. A job that one refers to has succeeded by then: it waited for it."""

    def __init__(self, jobs: JobStore, outputs: OutputStore, inputs: InputStore, s3: S3Store | None = None) -> None:
        self._jobs = jobs
        self._outputs = outputs
        self._inputs = inputs
        self._s3 = s3 or S3Store(None)

    async def resolve(self, payload: types_pb2.Payload) -> list[node_pb2.AssignedInput]:
        """The files of each reference, each reference once: all outputs of a job in a list, else the first.

        Raises INPUT_NOT_FOUND naming the field, STORE_UNAVAILABLE, S3_UNAVAILABLE.
        """
        found: dict[str, list[node_pb2.AssignedInput]] = {}
        for path, reference in references_of(payload, path="payload"):
            if reference not in found:
                files = await self._files_of(reference, path)
                found[reference] = files if path.endswith("]") else files[:1]
        return [one for files in found.values() for one in files]

    async def _files_of(self, text: str, path: str) -> list[node_pb2.AssignedInput]:
        reference = parse(text)
        files: list[node_pb2.AssignedInput] = []
        if reference is not None and reference.kind == "output":
            row = await self._outputs.get(reference.name)
            files = [] if row is None else [_input(text, types_pb2.Output.FromString(row.record))]
        elif reference is not None and reference.kind == "job":
            files = [_input(text, output) for output in await self._made_by(reference.name)]
        elif reference is not None and reference.kind == "input":
            files = await self._brought(text, reference.name)
        elif reference is not None:
            files = await self._stored(text, reference.bucket, reference.name)
        if not files:
            raise refused("INPUT_NOT_FOUND", path, f"there is no file behind {text!r} any more")
        return files

    async def _brought(self, reference: str, input_id: str) -> list[node_pb2.AssignedInput]:
        row = await self._inputs.get(input_id)
        if row is None:
            return []
        return [
            node_pb2.AssignedInput(
                reference=reference,
                filename=row.filename or input_id,
                content_type=row.content_type,
                size_bytes=row.size_bytes,
                sha256=row.sha256,
            )
        ]

    async def _stored(self, reference: str, bucket: str, key: str) -> list[node_pb2.AssignedInput]:
        """An object of S3, whose hash we do not know."""
        seen = await self._s3.stat(bucket, key)
        if seen is None:
            return []
        return [
            node_pb2.AssignedInput(
                reference=reference,
                filename=key.rpartition("/")[2],
                content_type=seen.content_type or "application/octet-stream",
                size_bytes=seen.size_bytes,
            )
        ]

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
