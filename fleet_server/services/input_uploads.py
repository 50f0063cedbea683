"""Files that callers bring for payloads to name: received whole, kept for a day and while jobs need them, then gone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import structlog
import uuid_utils
from fleet.v1 import fleet_pb2

from fleet_server.domain.errors import FleetError, invalid_field
from fleet_server.services.references import INPUT_PREFIX
from fleet_server.storage.buckets import WORKSPACE
from fleet_server.storage.outputs import LocalOutputs
from fleet_server.storage.s3 import S3Store
from fleet_server.store import InputRow, InputStore

_log = structlog.get_logger("fleet.inputs")
_DEFAULT_TYPE = "application/octet-stream"
_PAGE = 100


@dataclass(frozen=True, slots=True)
class InputSettings:
    """`ttl_seconds` is how long an input is kept at least; what is over is removed every `sweep_seconds`, or four times
    in `ttl_seconds` where that is more often."""

    max_bytes: int = 512 << 20
    ttl_seconds: float = 86_400
    sweep_seconds: float = 600


class InputUploads:
    """Receives inputs. `folder` is that of inputs on this server's disk, `home` this server.

    An input is received on the disk, since its hash comes with its end; then it goes to the bucket fleet-workspace,
    where every server finds it. While S3 is away or off it stays on the disk, and only this server can read it; `wake`
    says that S3 is back.
    """

    def __init__(
        self,
        rows: InputStore,
        folder: LocalOutputs,
        s3: S3Store,
        home: str,
        *,
        clock: Callable[[], int],
        settings: InputSettings | None = None,
    ) -> None:
        self._rows = rows
        self._folder = folder
        self._s3 = s3
        self._home = home
        self._clock = clock
        self._settings = settings or InputSettings()
        self._woken = asyncio.Event()

    async def receive(self, requests: AsyncIterator[fleet_pb2.UploadInputRequest]) -> fleet_pb2.UploadInputResponse:
        """What payloads name it by, once it is whole and safe on a disk.

        Raises DISK_FULL, BODY_TOO_LARGE, INVALID_FIELD (an empty file, a name with control characters).
        """
        input_id = str(uuid_utils.uuid7())
        first = await anext(aiter(requests), None)
        if first is None:
            raise invalid_field("content", "must not be empty: send the bytes of a file")
        filename = _plain(first.filename)
        size, sha256 = await self._folder.take(input_id, _chunks(first, requests, self._settings.max_bytes))
        try:
            if not size:
                raise invalid_field("content", "must not be empty: send the bytes of a file")
            content_type = first.content.content_type.strip() or _DEFAULT_TYPE
            key = await self._to_bucket(input_id, content_type, sha256)
            expire_ms = self._clock() + int(self._settings.ttl_seconds * 1000)
            row = InputRow(input_id, filename, content_type, size, sha256, self._home, key, expire_ms)
            await self._rows.put(row)
        except BaseException:
            await asyncio.shield(self._folder.delete(input_id))
            raise
        if key:
            await self._folder.delete(input_id)
        elif self._s3.status[0]:
            # It came back before this input could be seen in the folder.
            self.wake()
        reply = fleet_pb2.UploadInputResponse(
            reference=f"input:{input_id}",
            filename=filename,
            content_type=content_type,
            size_bytes=size,
            sha256=sha256,
        )
        reply.expire_time.FromMilliseconds(expire_ms)
        return reply

    async def _to_bucket(self, input_id: str, content_type: str, sha256: str) -> str:
        """Its name in the bucket; "" where it stays on the disk."""
        if not self._s3.status[0]:
            return ""
        key = f"{INPUT_PREFIX}{input_id}"
        try:
            stored = await self._s3.put(
                WORKSPACE, key, self._folder.path(input_id), content_type=_ascii(content_type), sha256=sha256
            )
        except FleetError as error:
            _log.warning("an input stays on this server's disk", detail=error.detail)
            return ""
        return key if stored.sha256_verified else ""

    def wake(self) -> None:
        """Has `run` look at once."""
        self._woken.set()

    async def run(self) -> None:
        """Moves to the bucket what the disk alone has and removes what is over, until cancelled."""
        seconds = min(self._settings.sweep_seconds, self._settings.ttl_seconds / 4)
        while True:
            self._woken.clear()
            for step in (self.move, self.sweep):
                try:
                    await step()
                except (FleetError, OSError) as error:
                    _log.info("inputs wait to be moved or removed", detail=str(error))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._woken.wait()

    async def move(self) -> None:
        """Puts into the bucket what this disk alone has; each file goes when its row says where it is now.

        What fails stays for the next time. Raises STORE_UNAVAILABLE, OSError.
        """
        if not self._s3.status[0]:
            return
        for one in await self._folder.listing():
            # Without a row it is being received, or over: then a sweep removes it.
            row = await self._rows.get(one.filename)
            if row is None:
                continue
            if not row.key:
                try:
                    key = await self._to_bucket(row.input_id, row.content_type, row.sha256)
                except OSError as error:
                    _log.warning("an input cannot be read", input_id=row.input_id, detail=str(error))
                    continue
                if not key or not await self._rows.moved(row.input_id, key):
                    continue
            await self._folder.delete(row.input_id)

    async def sweep(self) -> None:
        """Removes inputs whose time is over and that nobody needs, from the disk and from the bucket.

        Raises STORE_UNAVAILABLE, S3_UNAVAILABLE, OSError.
        """
        oldest_ms = self._clock() - int(self._settings.ttl_seconds * 1000)
        for one in await self._folder.listing():
            if one.modified_ms < oldest_ms and await self._rows.over(one.filename, self._clock()):
                await self._folder.delete(one.filename)
        after = ""
        while self._s3.status[0]:
            # Their names rise with the time at which they came, be they moved there later.
            found = await self._s3.list(WORKSPACE, INPUT_PREFIX, after, _PAGE)
            old = [one.key for one in found if one.modified_ms < oldest_ms]
            for key in old:
                if await self._rows.over(key.removeprefix(INPUT_PREFIX), self._clock()):
                    await self._s3.delete(WORKSPACE, key)
            if len(found) < _PAGE or not old:
                return
            after = found[-1].key


async def _chunks(
    first: fleet_pb2.UploadInputRequest, rest: AsyncIterator[fleet_pb2.UploadInputRequest], limit: int
) -> AsyncIterator[bytes]:
    left = limit

    def taken(request: fleet_pb2.UploadInputRequest) -> bytes:
        nonlocal left
        data: bytes = request.content.data
        left -= len(data)
        if left < 0:
            raise FleetError("BODY_TOO_LARGE", f"content: at most {limit:,} bytes are taken here")
        return data

    yield taken(first)
    async for request in rest:
        yield taken(request)


def _plain(filename: str) -> str:
    """The last part of a name, as browsers may send a whole path."""
    name = filename.replace("\\", "/").rpartition("/")[2].strip()
    if not name.isprintable():
        raise invalid_field("filename", "must not have control characters")
    return name


def _ascii(content_type: str) -> str:
    return content_type if content_type.isascii() and content_type.isprintable() else _DEFAULT_TYPE
