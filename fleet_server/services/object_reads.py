"""Reads of model files in the buckets by nodes: one read of the object, whole from one version, hashed as it passes."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator
from contextlib import aclosing

from fleet_server.domain.errors import Code, FleetError
from fleet_server.services.bucket_shelf import BUCKET_OF, BucketShelf
from fleet_server.storage.s3 import S3Store
from fleet_server.storage.s3_types import ObjectStat

_KINDS = {bucket: kind for kind, bucket in BUCKET_OF.items()}


class ObjectReads:
    """Never more of an object in memory than a few chunks."""

    def __init__(self, s3: S3Store, shelf: BucketShelf) -> None:
        self._s3 = s3
        self._shelf = shelf

    def sha256(self, stat: ObjectStat) -> str:
        """The object's hash, "" where nobody has computed it yet."""
        file = self._shelf.find(_KINDS.get(stat.bucket, ""), stat.key)
        if file is not None and file.etag == stat.etag and file.sha256:
            return file.sha256
        return stat.metadata.get("sha256", "")

    async def stream(self, stat: ObjectStat, offset: int, etag: str) -> AsyncGenerator[bytes, None]:
        """Bytes from `offset` on. Raises NoObjectError, S3_UNAVAILABLE; FAILED_PRECONDITION at the end where an object
        that should have been of version `etag` was replaced while it was read: the bytes may be of both."""
        # The hash of a model is worth knowing, and this is when all of it passes by.
        wanted = stat.bucket in _KINDS and not offset and not self.sha256(stat)
        digest = hashlib.sha256() if wanted else None
        async with aclosing(self._s3.stream(stat.bucket, stat.key, offset, stat.size_bytes)) as chunks:
            async for chunk in chunks:
                if digest is not None:
                    await asyncio.to_thread(digest.update, chunk)
                yield chunk
        if not etag and digest is None:
            return
        again = await self._s3.stat(stat.bucket, stat.key)
        if again is None or again.etag != stat.etag:
            raise changed(stat.bucket, stat.key)
        if digest is not None:
            self._shelf.learn(_KINDS[stat.bucket], stat.key, stat.etag, digest.hexdigest())


def changed(bucket: str, key: str) -> FleetError:
    """Another version than was asked for."""
    words = f"s3://{bucket}/{key} has another version by now: begin again"
    return FleetError("INPUT_NOT_FOUND", words, code=Code.FAILED_PRECONDITION)
