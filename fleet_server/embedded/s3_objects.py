"""Objects of the embedded S3: put, get, copy, delete, and uploads in parts."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import re
import sqlite3
from collections.abc import AsyncIterator, Callable
from email.utils import parsedate_to_datetime
from functools import partial
from itertools import pairwise
from typing import TypeVar
from urllib.parse import unquote

from nanio.errors import S3Error  # type: ignore[import-untyped]
from nanio.handlers._body import parse_xml_safely  # type: ignore[import-untyped]

from fleet_server.embedded.s3_answers import (
    Answer,
    Refusal,
    iso,
    no_bucket,
    no_key,
    not_implemented,
    object_headers,
    tag,
    xml,
)
from fleet_server.embedded.s3_request import Call, Sums
from fleet_server.embedded.s3_shelf import Blob, Item, PartRow, Shelf, Upload

T = TypeVar("T")
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_RANGE = re.compile(r"bytes=(\d*)-(\d*)\Z")
_MAX_PART = 5 << 30
_MIN_PART = 5 << 20
_MAX_PARTS = 10_000
_XML_BYTES = 1 << 20
_PIECE = 1 << 20
_OVERRIDES = {
    "response-content-type": "Content-Type",
    "response-content-language": "Content-Language",
    "response-expires": "Expires",
    "response-cache-control": "Cache-Control",
    "response-content-disposition": "Content-Disposition",
    "response-content-encoding": "Content-Encoding",
}
OVERRIDES = frozenset(_OVERRIDES)
"""Query parameters with which a signed GET chooses headers of its reply."""


def disk_full() -> Refusal:
    """The disk has no room for the object."""
    return Refusal(507, "XMinioStorageFull", "the server's disk is full: free some space, then send it again")


class Objects:
    """What can be done with objects. `clock` is Unix ms. Blocking work runs in threads."""

    def __init__(self, shelf: Shelf, *, clock: Callable[[], int], disk_floor_bytes: int) -> None:
        self._shelf = shelf
        self._clock = clock
        self._floor = disk_floor_bytes

    # Reading.

    async def get(self, call: Call, *, signed: bool) -> Answer:
        """GET and HEAD: whole, a range, or not at all where the caller's copy will do."""
        for _ in range(2):
            item = await self._found(call.bucket, call.key)
            headers = object_headers(item)
            if signed:
                headers |= {_OVERRIDES[name]: value for name, value in call.query.items() if name in _OVERRIDES}
            early = _conditions(call, item, headers)
            if early is not None:
                return early
            start, end, partial = _range(call, item)
            headers["Content-Length"] = str(end - start)
            if partial:
                headers["Content-Range"] = f"bytes {start}-{end - 1}/{item.size}"
            status = 206 if partial else 200
            if call.method == "HEAD":
                return Answer(status, headers=headers)
            with contextlib.suppress(FileNotFoundError):
                blob = await asyncio.to_thread(self._shelf.open_blob, item.blob)
                return Answer(status, headers=headers, blob=blob, start=start, length=end - start)
            # Replaced or deleted in between: looked up again.
        raise no_key()

    async def _found(self, bucket: str, key: str) -> Item:
        item = await asyncio.to_thread(self._shelf.get, bucket, key)
        if item is None:
            raise no_key() if await asyncio.to_thread(self._shelf.has_bucket, bucket) else no_bucket()
        return item

    # Writing.

    async def put(self, call: Call, body: AsyncIterator[bytes]) -> Answer:
        """Stores an object, whole or not at all."""
        new = "if-none-match" in call.headers
        if "if-match" in call.headers or call.headers.get("if-none-match", "*") != "*":
            raise not_implemented("a conditional put other than If-None-Match: *")
        headers = call.kept_headers()
        await self._bucket(call.bucket)
        blob = await self._receive(call, body)
        await self._place(call.bucket, call.key, blob, blob.md5, headers, new=new)
        return Answer(headers={"ETag": f'"{blob.md5}"'})

    async def copy(self, call: Call) -> Answer:
        """Copies an object of this server."""
        directive = call.headers.get("x-amz-metadata-directive", "COPY")
        if directive not in ("COPY", "REPLACE"):
            raise Refusal(400, "InvalidArgument", "x-amz-metadata-directive is COPY or REPLACE")
        bucket, _, key = unquote(call.headers["x-amz-copy-source"]).removeprefix("/").partition("/")
        if "?" in call.headers["x-amz-copy-source"]:
            raise not_implemented("a version in x-amz-copy-source")
        if (bucket, key) == (call.bucket, call.key) and directive == "COPY":
            raise Refusal(400, "InvalidRequest", "copying an object to itself changes nothing")
        await self._bucket(call.bucket)
        item = await self._found(bucket, key)
        headers = dict(item.headers) if directive == "COPY" else call.kept_headers()
        self._check_room(item.size)
        blob = await _written(lambda: self._shelf.joined([item.blob]))
        now = await self._place(call.bucket, call.key, blob, blob.md5, headers)
        return xml("CopyObjectResult", tag("LastModified", iso(now)) + tag("ETag", f'"{blob.md5}"'))

    async def delete(self, call: Call) -> Answer:
        """Removes an object; 204 where there is none as well."""
        await self._bucket(call.bucket)
        await asyncio.to_thread(self._shelf.delete, call.bucket, call.key)
        return Answer(204)

    # Uploads in parts.

    async def begin(self, call: Call) -> Answer:
        """Starts an upload."""
        await self._bucket(call.bucket)
        upload_id = await asyncio.to_thread(
            self._shelf.begin, call.bucket, call.key, call.kept_headers(), self._clock()
        )
        inner = tag("Bucket", call.bucket) + tag("Key", call.key) + tag("UploadId", upload_id)
        return xml("InitiateMultipartUploadResult", inner)

    async def add_part(self, call: Call, body: AsyncIterator[bytes]) -> Answer:
        """Stores a part."""
        number = call.query["partNumber"]
        if not number.isascii() or not number.isdecimal() or not 1 <= int(number) <= _MAX_PARTS:
            raise Refusal(400, "InvalidArgument", "partNumber is 1 to 10000")
        upload = await self._upload(call)
        blob = await self._receive(call, body)
        if not await asyncio.to_thread(self._shelf.add_part, upload.upload_id, int(number), blob, self._clock()):
            await asyncio.to_thread(self._shelf.drop_blob, blob.name)
            raise _no_upload()
        return Answer(headers={"ETag": f'"{blob.md5}"'})

    async def complete(self, call: Call, body: AsyncIterator[bytes]) -> Answer:
        """Makes one object of the parts that are named."""
        upload = await self._upload(call)
        wanted = _wanted_parts(await whole(call, body))
        parts = {part.number: part for part in await asyncio.to_thread(self._shelf.parts, upload.upload_id)}
        chosen = [_checked_part(parts, number, etag) for number, etag in wanted]
        if any(part.size < _MIN_PART for part in chosen[:-1]):
            raise Refusal(400, "EntityTooSmall", "every part but the last has at least 5 MiB")
        self._check_room(sum(part.size for part in chosen))
        blob = await _written(lambda: self._shelf.joined([part.blob for part in chosen]))
        digests = b"".join(bytes.fromhex(part.md5) for part in chosen)
        etag = f"{hashlib.md5(digests, usedforsecurity=False).hexdigest()}-{len(chosen)}"
        await self._place(upload.bucket, upload.key, blob, etag, dict(upload.headers))
        await asyncio.to_thread(self._shelf.end, upload.upload_id)
        inner = tag("Location", f"/{call.bucket}/{call.key}") + tag("Bucket", call.bucket)
        return xml("CompleteMultipartUploadResult", inner + tag("Key", call.key) + tag("ETag", f'"{etag}"'))

    async def abort(self, call: Call) -> Answer:
        """Ends an upload without an object."""
        upload = await self._upload(call)
        await asyncio.to_thread(self._shelf.end, upload.upload_id)
        return Answer(204)

    async def list_parts(self, call: Call) -> Answer:
        """The parts that are there."""
        upload = await self._upload(call)
        parts = await asyncio.to_thread(self._shelf.parts, upload.upload_id)
        inner = tag("Bucket", call.bucket) + tag("Key", call.key) + tag("UploadId", upload.upload_id)
        inner += tag("MaxParts", _MAX_PARTS) + tag("IsTruncated", "false")
        for part in parts:
            inner += (
                "<Part>"
                + tag("PartNumber", part.number)
                + tag("LastModified", iso(part.modified_ms))
                + tag("ETag", f'"{part.md5}"')
                + tag("Size", part.size)
                + "</Part>"
            )
        return xml("ListPartsResult", inner)

    # Inside.

    async def _bucket(self, bucket: str) -> None:
        if not await asyncio.to_thread(self._shelf.has_bucket, bucket):
            raise no_bucket()

    async def _upload(self, call: Call) -> Upload:
        upload = await asyncio.to_thread(self._shelf.upload, call.query["uploadId"])
        if upload is None or (upload.bucket, upload.key) != (call.bucket, call.key):
            raise _no_upload()
        return upload

    def _check_room(self, size: int) -> None:
        if self._shelf.free_bytes() < size + self._floor:
            raise disk_full()

    async def _receive(self, call: Call, body: AsyncIterator[bytes]) -> Blob:
        length = call.length()
        if length is None:
            raise Refusal(411, "MissingContentLength", "You must provide the Content-Length HTTP header.")
        if length > _MAX_PART:
            raise Refusal(400, "EntityTooLarge", "at most 5 GiB in one put: send it in parts")
        self._check_room(length)
        sums = Sums(call.headers)
        new = await _written(self._shelf.new_blob)

        def keep(pieces: list[bytes]) -> None:
            for piece in pieces:
                new.write(piece)
                sums.update(piece)

        try:
            size = kept = 0
            waiting: list[bytes] = []
            async for data in body:
                size += len(data)
                if size > length:
                    raise Refusal(400, "IncompleteBody", "more bytes came than the headers say")
                waiting.append(data)
                if size - kept >= _PIECE:
                    await _written(partial(keep, waiting))
                    waiting, kept = [], size
            if size != length:
                raise Refusal(400, "IncompleteBody", "fewer bytes came than the headers say")
            await _written(partial(keep, waiting))
            sums.check()
            return await _written(new.finish)
        except BaseException:
            await asyncio.shield(asyncio.to_thread(new.discard))
            raise

    async def _place(
        self, bucket: str, key: str, blob: Blob, etag: str, headers: dict[str, str], *, new: bool = False
    ) -> int:
        now = self._clock()
        try:
            placed = await _written(
                lambda: self._shelf.put(bucket, key, blob, etag=etag, headers=headers, now_ms=now, new=new)
            )
        except BaseException:
            await asyncio.shield(asyncio.to_thread(self._shelf.drop_blob, blob.name))
            raise
        if not placed:
            await asyncio.to_thread(self._shelf.drop_blob, blob.name)
            raise Refusal(412, "PreconditionFailed", "there is an object of that name")
        return now


async def whole(call: Call, body: AsyncIterator[bytes]) -> bytes:
    """A small body, of XML, which is what the call says it is."""
    data = b""
    async for chunk in body:
        data += chunk
        if len(data) > _XML_BYTES:
            raise Refusal(400, "EntityTooLarge", "a body of XML has at most 1 MiB")
    sums = Sums(call.headers)
    sums.update(data)
    sums.check()
    return data


async def _written(work: Callable[[], T]) -> T:
    """Runs what writes, in a thread; a full disk is a refusal."""
    try:
        return await asyncio.to_thread(work)
    except OSError as error:
        if error.errno in _FULL:
            raise disk_full() from error
        raise
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
            raise disk_full() from error
        raise


def _no_upload() -> Refusal:
    return Refusal(404, "NoSuchUpload", "The specified multipart upload does not exist.")


def _wanted_parts(body: bytes) -> list[tuple[int, str]]:
    try:
        root = parse_xml_safely(body)
        found = [{child.tag.split("}")[-1]: (child.text or "").strip() for child in part} for part in root]
        wanted = [(int(part["PartNumber"]), part["ETag"].strip('"')) for part in found]
    except (S3Error, KeyError, ValueError):
        raise Refusal(400, "MalformedXML", "the list of parts cannot be read") from None
    if not 1 <= len(wanted) <= _MAX_PARTS:
        raise Refusal(400, "MalformedXML", "1 to 10000 parts make an object")
    if any(one[0] >= other[0] for one, other in pairwise(wanted)):
        raise Refusal(400, "InvalidPartOrder", "The list of parts was not in ascending order.")
    return wanted


def _checked_part(parts: dict[int, PartRow], number: int, etag: str) -> PartRow:
    part = parts.get(number)
    if part is None or part.md5 != etag:
        raise Refusal(400, "InvalidPart", f"part {number} is not there, or its ETag is another")
    return part


def _conditions(call: Call, item: Item, headers: dict[str, str]) -> Answer | None:
    """304 or 412 where the caller's conditions say so, as RFC 9110 orders them."""
    given, etag = call.headers, item.etag
    if "if-match" in given:
        if not _matches(given["if-match"], etag):
            raise Refusal(412, "PreconditionFailed", "If-Match: the object is another")
    elif "if-unmodified-since" in given and _newer(item, given["if-unmodified-since"]):
        raise Refusal(412, "PreconditionFailed", "If-Unmodified-Since: the object is newer")
    kept = {name: value for name, value in headers.items() if name in ("ETag", "Last-Modified", "Cache-Control")}
    if "if-none-match" in given:
        return Answer(304, headers=kept) if _matches(given["if-none-match"], etag) else None
    if "if-modified-since" in given and _newer(item, given["if-modified-since"]) is False:
        return Answer(304, headers=kept)
    return None


def _matches(listed: str, etag: str) -> bool:
    words = [word.strip().removeprefix("W/").strip('"') for word in listed.split(",")]
    return "*" in words or etag in words


def _newer(item: Item, date: str) -> bool | None:
    """Whether the object is newer than a date of HTTP, None where that is no date."""
    try:
        return item.modified_ms // 1000 > parsedate_to_datetime(date).timestamp()
    except ValueError:
        return None


def _range(call: Call, item: Item) -> tuple[int, int, bool]:
    """First byte, the one after the last, and whether that is a part. Several ranges, or none that can be read: all."""
    found = _RANGE.match(call.headers.get("range", "").replace(" ", ""))
    condition = call.headers.get("if-range")
    if found is None or found.groups() == ("", "") or (condition is not None and not _matches(condition, item.etag)):
        return 0, item.size, False
    first, last = found.groups()
    if first:
        start, end = int(first), min(int(last) + 1, item.size) if last else item.size
        if last and int(last) < start:
            return 0, item.size, False
    else:
        start, end = max(0, item.size - int(last)), item.size
    if start >= end:
        raise Refusal(
            416, "InvalidRange", "The requested range is not satisfiable", {"Content-Range": f"bytes */{item.size}"}
        )
    return start, end, True
