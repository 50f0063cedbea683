"""Node.ReadFile: the bytes of a file that a node needs, from wherever the server has it or can get it."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from fleet.v1 import command_pb2

from fleet_server.domain.errors import Code, FleetError, invalid_field
from fleet_server.services.bucket_shelf import BUCKET_OF, BucketShelf
from fleet_server.storage.buckets import BUCKETS
from fleet_server.storage.s3 import S3Store
from fleet_server.storage.s3_types import NoObjectError, ObjectStat

Request = command_pb2.ReadFileRequest
Parts = AsyncGenerator[command_pb2.ReadFileResponse, None]
Road = Callable[[Request], Parts]
"""Reads one kind of reference. The first part has the size, and the hash where it is known; then come the bytes."""

_KINDS = {bucket: kind for kind, bucket in BUCKET_OF.items()}


class Files:
    """Reads files by reference: `roads` has who reads what, by the word before the colon."""

    def __init__(self, roads: dict[str, Road]) -> None:
        self._roads = roads

    async def read(self, request: Request) -> Parts:
        """The file from `offset` on. Raises INVALID_FIELD, INPUT_NOT_FOUND, S3_UNAVAILABLE, FILE_CHANGED
        (FAILED_PRECONDITION: another version than `etag`), OUT_OF_RANGE (an offset past the end)."""
        road = self._roads.get(request.reference.partition(":")[0])
        if road is None:
            raise invalid_field("reference", "must be one of " + ", ".join(f"{word}:…" for word in sorted(self._roads)))
        if request.offset < 0:
            raise invalid_field("offset", "must be at least 0", request.offset)
        async with aclosing(road(request)) as parts:
            async for part in parts:
                yield part


class BucketFiles:
    """The road of `s3://<bucket>/<key>`. One read of the object, never more of it in memory than a few chunks."""

    def __init__(self, s3: S3Store, shelf: BucketShelf) -> None:
        self._s3 = s3
        self._shelf = shelf

    async def read(self, request: Request) -> Parts:
        """See `Files.read`."""
        bucket, _, key = request.reference.removeprefix("s3://").partition("/")
        if not request.reference.startswith("s3://") or bucket not in BUCKETS or not key:
            raise invalid_field("reference", "must be s3://<bucket>/<key> in one of " + ", ".join(BUCKETS))
        stat = await self._stat(bucket, key, request.etag)
        if request.offset > stat.size_bytes:
            words = f"offset: {request.offset} is past the end of {request.reference}, {stat.size_bytes} bytes"
            raise FleetError("RANGE_NOT_SATISFIABLE", words)
        file = self._shelf.find(_KINDS.get(bucket, ""), key)
        known = file.sha256 if file is not None and file.etag == stat.etag else ""
        yield command_pb2.ReadFileResponse(size_bytes=stat.size_bytes, sha256=known or stat.metadata.get("sha256", ""))
        if request.offset == stat.size_bytes:
            return
        # The hash of a model is worth knowing, and this is when all of it passes by.
        digest = hashlib.sha256() if file is not None and not known and not request.offset else None
        try:
            async with aclosing(self._s3.stream(bucket, key, request.offset)) as chunks:
                async for chunk in chunks:
                    if digest is not None:
                        await asyncio.to_thread(digest.update, chunk)
                    yield command_pb2.ReadFileResponse(chunk=chunk)
        except NoObjectError as error:
            raise _gone(request.reference) from error
        if request.etag:
            # Replaced while it was read: the bytes may be of both.
            await self._stat(bucket, key, request.etag)
        if digest is not None and file is not None:
            self._shelf.learn(file.kind, file.name, stat.etag, digest.hexdigest())

    async def _stat(self, bucket: str, key: str, etag: str) -> ObjectStat:
        stat = await self._s3.stat(bucket, key)
        if stat is None:
            raise _gone(f"s3://{bucket}/{key}")
        if etag and stat.etag != etag:
            raise FleetError(
                "FILE_CHANGED",
                f"etag: s3://{bucket}/{key} is another version by now, {stat.etag}",
                code=Code.FAILED_PRECONDITION,
            )
        return stat


def _gone(reference: str) -> FleetError:
    return FleetError("INPUT_NOT_FOUND", f"reference: {reference} is not there")
