"""Calls to an S3 server that block: for threads of `S3Store` alone. They raise what the SDK raises."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

import certifi
import urllib3
from minio import Minio
from minio.commonconfig import CopySource
from minio.datatypes import Object
from minio.error import S3Error

from fleet_server.storage.s3_digest import Digest, HashingReader
from fleet_server.storage.s3_errors import MISSING
from fleet_server.storage.s3_types import Cancel, NoObjectError, ObjectStat, S3Config, S3Limits, Stored

_META = "x-amz-meta-"


def client(config: S3Config, limits: S3Limits) -> Minio:
    """A client with our timeouts. An idle connection that the server has closed is tried again once."""
    parts = urlsplit(config.endpoint)
    retries = urllib3.Retry(total=1, connect=0, redirect=0, status=0, other=0, backoff_factor=0, allowed_methods=None)
    pool = urllib3.PoolManager(
        timeout=urllib3.Timeout(connect=limits.connect_seconds, read=limits.read_seconds),
        maxsize=limits.threads + limits.streams,
        retries=retries,
        cert_reqs="CERT_REQUIRED",
        ca_certs=os.environ.get("SSL_CERT_FILE") or certifi.where(),
    )
    return Minio(
        parts.netloc,
        access_key=config.access_key,
        secret_key=config.secret_key,
        secure=parts.scheme == "https",
        region=config.region or None,
        http_client=pool,
    )


class S3Calls:
    """One blocking method for each thing that the fleet does with objects."""

    def __init__(self, minio: Minio, limits: S3Limits) -> None:
        self._minio = minio
        self._limits = limits

    def put(
        self,
        bucket: str,
        key: str,
        source: Path | bytes,
        *,
        content_type: str,
        sha256: str | None,
        metadata: Mapping[str, str],
        cancel: Cancel,
    ) -> Stored:
        """Sends a file, then judges what the server says it has."""
        with _opened(source) as file:
            size = os.fstat(file.fileno()).st_size if isinstance(source, Path) else len(source)
            digest = Digest(self._limits.part_bytes)
            result = self._minio.put_object(
                bucket,
                key,
                cast(BinaryIO, HashingReader(file, digest, cancel.check)),
                size,
                content_type=content_type,
                metadata=dict(metadata),
                part_size=self._limits.part_bytes,
                num_parallel_uploads=1,
            )
        etag = result.etag
        if not etag:
            # Some servers leave it out of the reply to the last part.
            seen = self.stat(bucket, key)
            etag = "" if seen is None else seen.etag
        if sha256 is not None and digest.sha256 != sha256:
            return Stored(size, etag, digest.sha256, False, "the file here has not the hash that it should have")
        proven = etag == digest.etag() or self._same(bucket, key, size, digest.sha256, digest, cancel)
        return Stored(size, etag, digest.sha256, proven, "" if proven else "the server has other bytes than were sent")

    def verify(self, bucket: str, key: str, *, size: int, sha256: str, path: Path | None, cancel: Cancel) -> bool:
        """Whether the server has exactly those bytes, by its own checksums, else by reading them back."""
        digest = None
        if path is not None:
            digest = Digest(self._limits.part_bytes)
            with path.open("rb") as file:
                reader = HashingReader(file, digest, cancel.check)
                while reader.read(self._limits.chunk_bytes):
                    pass
            if digest.sha256 != sha256 or digest.size != size:
                return False
        return self._same(bucket, key, size, sha256, digest, cancel)

    def _same(self, bucket: str, key: str, size: int, sha256: str, digest: Digest | None, cancel: Cancel) -> bool:
        try:
            seen = self._minio.stat_object(bucket, key, extra_headers={"x-amz-checksum-mode": "ENABLED"})
        except S3Error as error:
            if error.code in MISSING:
                return False
            raise
        if seen.size != size:
            return False
        if digest is not None and _etag(seen) == digest.etag():
            return True
        theirs = dict(seen.metadata or {}).get("x-amz-checksum-sha256", "")
        if digest is not None and theirs and theirs == digest.sha256_base64:
            return True
        read = Digest(self._limits.part_bytes)
        for chunk in self.read(bucket, key, 0, size, cancel):
            read.update(chunk)
        return read.size == size and read.sha256 == sha256

    def stat(self, bucket: str, key: str) -> ObjectStat | None:
        """What the server says of an object, None if there is none."""
        try:
            return _stat(self._minio.stat_object(bucket, key))
        except S3Error as error:
            if error.code in MISSING:
                return None
            raise

    def list(self, bucket: str, prefix: str, after: str, limit: int) -> list[ObjectStat]:
        """The first `limit` objects with that prefix whose keys come after `after`."""
        found = self._minio.list_objects(bucket, prefix=prefix, recursive=True, start_after=after or None)
        return [_stat(one) for one in islice(cast(Iterator[Object], found), limit)]

    def delete(self, bucket: str, key: str) -> None:
        """Removes an object; fine where there is none."""
        try:
            self._minio.remove_object(bucket, key)
        except S3Error as error:
            if error.code not in MISSING:
                raise

    def copy(self, source: tuple[str, str], target: tuple[str, str]) -> None:
        """Copies an object on the server."""
        try:
            self._minio.copy_object(*target, CopySource(*source))
        except S3Error as error:
            if error.code in MISSING:
                raise NoObjectError(*source) from error
            raise

    def open(self, bucket: str, key: str, start: int, end: int | None) -> Any:
        """A response whose body is the object from `start` to before `end`; `finish` it."""
        length = 0 if end is None else end - start
        try:
            return self._minio.get_object(bucket, key, offset=start, length=length)
        except S3Error as error:
            if error.code in MISSING:
                raise NoObjectError(bucket, key) from error
            raise

    def read(self, bucket: str, key: str, start: int, end: int | None, cancel: Cancel) -> Iterator[bytes]:
        """The bytes themselves, a chunk at a time."""
        if end is not None and end <= start:
            return
        response = self.open(bucket, key, start, end)
        try:
            while chunk := response.read(self._limits.chunk_bytes):
                cancel.check()
                yield chunk
        finally:
            finish(response)


def finish(response: Any) -> None:
    """Gives a response's connection back where its body was read to the end, else closes it."""
    if response.closed:
        response.release_conn()
    else:
        response.close()


def _opened(source: Path | bytes) -> BinaryIO:
    return source.open("rb") if isinstance(source, Path) else io.BytesIO(source)


def _etag(seen: Object) -> str:
    return (seen.etag or "").strip('"')


def _stat(seen: Object) -> ObjectStat:
    headers = {name.lower(): value for name, value in (seen.metadata or {}).items()}
    return ObjectStat(
        bucket=seen.bucket_name,
        key=seen.object_name or "",
        size_bytes=seen.size or 0,
        etag=_etag(seen),
        modified_ms=0 if seen.last_modified is None else int(seen.last_modified.timestamp() * 1000),
        content_type=seen.content_type or "",
        metadata={name[len(_META) :]: value for name, value in headers.items() if name.startswith(_META)},
    )
