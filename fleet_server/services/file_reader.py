"""Files that the server has or can get, read by agents: inputs, outputs, objects of S3."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass

from fleet.v1 import command_pb2, types_pb2

from fleet_server.domain.errors import Code, FleetError, invalid_field
from fleet_server.services.object_reads import ObjectReads
from fleet_server.services.output_files import OutputFiles
from fleet_server.services.references import parse
from fleet_server.storage.buckets import WORKSPACE
from fleet_server.storage.outputs import LocalOutputs
from fleet_server.storage.s3 import S3Store
from fleet_server.storage.s3_types import NoObjectError, unavailable
from fleet_server.store import InputRow, InputStore, OutputStore

Stream = AsyncGenerator[bytes, None]


@dataclass(frozen=True, slots=True)
class _Source:
    size_bytes: int
    sha256: str
    open: Callable[[int], Stream]


class FileReader:
    """Streams files by reference. `inputs` is the folder of inputs on this server's disk, `home` this server."""

    def __init__(
        self,
        files: OutputFiles,
        outputs: OutputStore,
        input_rows: InputStore,
        inputs: LocalOutputs,
        s3: S3Store,
        home: str = "",
    ) -> None:
        self._files = files
        self._outputs = outputs
        self._input_rows = input_rows
        self._inputs = inputs
        self._s3 = s3
        self._home = home
        self.objects: ObjectReads | None = None
        """Who reads models of the buckets; set before the first call."""

    async def read(self, request: command_pb2.ReadFileRequest) -> AsyncGenerator[command_pb2.ReadFileResponse, None]:
        """Size and hash first, then the bytes from `offset` on.

        Raises INPUT_NOT_FOUND, INVALID_FIELD (no reference, an offset past the end), S3_UNAVAILABLE, and
        FAILED_PRECONDITION where an object of S3 has another version than `etag`.
        """
        try:
            source = await self._source(request.reference, request.etag)
            if not 0 <= request.offset <= source.size_bytes:
                raise invalid_field("offset", f"must be from 0 to {source.size_bytes}", request.offset)
            yield command_pb2.ReadFileResponse(size_bytes=source.size_bytes, sha256=source.sha256)
            if request.offset == source.size_bytes:
                return
            async with aclosing(source.open(request.offset)) as chunks:
                async for chunk in chunks:
                    yield command_pb2.ReadFileResponse(chunk=chunk)
        except NoObjectError as error:
            raise _missing(request.reference) from error
        except FleetError as error:
            if error.reason == "OUTPUT_NOT_FOUND":
                raise _missing(request.reference) from error
            raise

    async def _source(self, text: str, etag: str) -> _Source:
        reference = parse(text)
        if reference is None or reference.kind == "job":
            raise invalid_field("reference", "must be input:<id>, output:<filename> or s3://<bucket>/<key>")
        if reference.kind == "s3":
            return await self._object(reference.bucket, reference.name, etag)
        if reference.kind == "output":
            return await self._output(reference.name)
        return await self._input(reference.name)

    async def _object(self, bucket: str, key: str, etag: str) -> _Source:
        found = await self._s3.stat(bucket, key)
        if found is None:
            raise NoObjectError(bucket, key)
        if etag and found.etag != etag:
            raise FleetError(
                "INPUT_NOT_FOUND",
                f"s3://{bucket}/{key} has another version by now: begin again",
                code=Code.FAILED_PRECONDITION,
            )
        if (objects := self.objects) is not None:
            known = objects.sha256(found)
            return _Source(found.size_bytes, known, lambda offset: objects.stream(found, offset, etag))
        return _Source(found.size_bytes, "", lambda offset: self._s3.stream(bucket, key, offset, found.size_bytes))

    async def _output(self, filename: str) -> _Source:
        row = await self._outputs.get(filename)
        seen = None if row is None else await self._files.stat(filename)
        if row is None or seen is None:
            raise _missing(f"output:{filename}")
        sha256 = types_pb2.Output.FromString(row.record).sha256
        return _Source(row.size_bytes, sha256, lambda offset: self._files.stream(filename, offset, row.size_bytes))

    async def _input(self, input_id: str) -> _Source:
        row = await self._input_rows.get(input_id)
        if row is None:
            raise _missing(f"input:{input_id}")
        if not row.key and row.home not in ("", self._home):
            well, detail = self._s3.status
            words = "it goes to S3 any moment now" if well else f"it goes to S3 when that is back ({detail})"
            raise unavailable(f"reference: input:{input_id} is on the disk of the server {row.home!r} alone; {words}")
        return _Source(row.size_bytes, row.sha256, lambda offset: self._brought(row, offset))

    async def _brought(self, row: InputRow, offset: int) -> Stream:
        """From the bucket, or from this disk while it is there alone."""
        key = row.key
        if not key:
            try:
                async with aclosing(self._inputs.stream(row.input_id, offset, row.size_bytes)) as near:
                    async for chunk in near:
                        yield chunk
                return
            except FleetError as error:
                # Raised before the first byte: it may have moved since its row was read.
                now = await self._input_rows.get(row.input_id)
                if error.reason != "OUTPUT_NOT_FOUND" or now is None or not now.key:
                    raise
                key = now.key
        async with aclosing(self._s3.stream(WORKSPACE, key, offset, row.size_bytes)) as far:
            async for chunk in far:
                yield chunk


def _missing(reference: str) -> FleetError:
    return FleetError("INPUT_NOT_FOUND", f"reference: there is no file behind {reference!r} any more")
