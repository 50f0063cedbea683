"""Outputs as callers see them: the record of their making, with where they are now."""

from __future__ import annotations

from collections.abc import Sequence

from fleet.v1 import types_pb2

from fleet_server.storage.buckets import OUTPUTS
from fleet_server.storage.s3 import S3Store
from fleet_server.storage.s3_types import ObjectStat
from fleet_server.store import OutputRow

_COMFYUI, _CLIPS = "comfyui", "animatediff"


def object_key(filename: str, making: types_pb2.OutputMetadata) -> str:
    """The name of an output in the bucket: what ComfyUI makes has folders of its own."""
    if making.engine != _COMFYUI:
        return filename
    return f"{_CLIPS if making.job_type == types_pb2.JOB_TYPE_VIDEO_GEN else _COMFYUI}/{filename}"


class OutputViews:
    """Makes fleet.v1.Output of rows."""

    def __init__(self, s3: S3Store) -> None:
        self._s3 = s3

    def of(self, row: OutputRow) -> types_pb2.Output:
        """The output, with metadata."""
        output = types_pb2.Output.FromString(row.record)
        del output.sources[:]
        if row.local:
            output.sources.append("local")
        if row.synced:
            output.sources.append("s3")
            if self._s3.on:
                output.s3_url = self._s3.url(OUTPUTS, row.object_key)
        output.starred = row.starred
        return output

    def refresh(self, outputs: Sequence[types_pb2.Output], rows: Sequence[OutputRow | None]) -> None:
        """Outputs of a job's result say where they are now; of one that was deleted: nowhere."""
        for output, row in zip(outputs, rows, strict=True):
            del output.sources[:]
            output.ClearField("s3_url")
            if row is not None:
                now = self.of(row)
                output.sources.extend(now.sources)
                output.starred = now.starred
                if now.HasField("s3_url"):
                    output.s3_url = now.s3_url

    def kept(self, output: types_pb2.Output, row: OutputRow) -> bytes:
        """An output of `of` to be kept, whatever becomes of the address of S3; `restored` gives it back."""
        kept = types_pb2.Output()
        kept.CopyFrom(output)
        kept.s3_url = row.object_key
        return kept.SerializeToString()

    def restored(self, content: bytes) -> types_pb2.Output:
        """What `kept` was given."""
        output = types_pb2.Output.FromString(content)
        key = output.s3_url
        output.ClearField("s3_url")
        if self._s3.on and "s3" in output.sources:
            output.s3_url = self._s3.url(OUTPUTS, key)
        return output

    def of_object(self, found: ObjectStat) -> types_pb2.Output:
        """An object of the bucket that is no output of ours: what is unknown is null."""
        filename = found.key.rpartition("/")[2]
        output = types_pb2.Output(
            filename=filename,
            url=f"/api/vision/outputs/{filename}",
            s3_url=self._s3.url(OUTPUTS, found.key),
            sources=["s3"],
            content_type=found.content_type or "application/octet-stream",
            size_bytes=found.size_bytes,
        )
        output.create_time.FromMilliseconds(found.modified_ms)
        return output

    def of_file(self, filename: str, size_bytes: int, modified_ms: int) -> types_pb2.Output:
        """A file of the folder that is no output of ours."""
        output = types_pb2.Output(
            filename=filename,
            url=f"/api/vision/outputs/{filename}",
            sources=["local"],
            content_type="application/octet-stream",
            size_bytes=size_bytes,
        )
        output.create_time.FromMilliseconds(modified_ms)
        return output
