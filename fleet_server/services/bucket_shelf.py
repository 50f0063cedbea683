"""The model files of the buckets, in memory: listed now and then in the background, their headers read once."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

import orjson
import structlog

from fleet_server.domain.errors import FleetError
from fleet_server.domain.fetching import ShelfFile
from fleet_server.domain.model_header import LENGTH_BYTES, BadHeaderError, ModelHeader, header_length, read_header
from fleet_server.storage.buckets import LORAS, MODELS
from fleet_server.storage.s3_types import NoObjectError, ObjectStat

_log = structlog.get_logger("fleet.models")
BUCKET_OF: Mapping[str, str] = {"checkpoint": MODELS, "lora": LORAS}
_NAME = re.compile(
    r"(?:[A-Za-z0-9_][A-Za-z0-9 ._+()\[\]@=,~#-]{0,200}/)*[A-Za-z0-9_][A-Za-z0-9 ._+()\[\]@=,~#-]{0,200}"
)
_GUESS_BYTES = 256 << 10
"""What the first read of a header asks for: more than most have."""
Key = tuple[str, str]
"""Kind and name."""


class Objects(Protocol):
    """What is asked of `S3Store`."""

    @property
    def on(self) -> bool: ...

    async def list(self, bucket: str, prefix: str = "", after: str = "", limit: int = 1000) -> list[ObjectStat]: ...

    async def stat(self, bucket: str, key: str) -> ObjectStat | None: ...

    def stream(self, bucket: str, key: str, start: int = 0, end: int | None = None) -> AsyncGenerator[bytes]: ...

    def on_back(self, listener: Callable[[], None]) -> Callable[[], None]: ...


@dataclass(frozen=True, slots=True)
class ShelfSettings:
    """`readers` headers are read at once; `files` are listed at most, `page` in one request."""

    refresh_seconds: float = 30.0
    least_seconds: float = 1.0
    """Between two looks, however many ask for names that are not there."""
    readers: int = 4
    files: int = 100_000
    page: int = 1_000


class BucketShelf:
    """`run` is one task. Reads never wait; with S3 away they answer what was there last, also after a restart
    (kept in `path`). `changed` is called when the list is another."""

    def __init__(
        self,
        s3: Objects,
        path: Path,
        settings: ShelfSettings | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._s3 = s3
        self._path = path
        self._settings = settings or ShelfSettings()
        self._clock = clock
        self._files: dict[Key, ShelfFile] = {}
        self._troubles: dict[tuple[str, str, str], tuple[float, str]] = {}
        self._refreshing = asyncio.Lock()
        self._hurry = asyncio.Event()
        self._refused: dict[tuple[str, str], str] = {}
        self._listeners: list[Callable[[], None]] = []
        self._unsaved = False
        self.refreshes = 0

    # Reading.

    def find(self, kind: str, name: str) -> ShelfFile | None:
        """The file of that name, None if there is none."""
        return self._files.get((kind, name))

    def files(self, kind: str) -> dict[str, ShelfFile]:
        """All of a kind, by name."""
        return {name: file for (its, name), file in self._files.items() if its == kind}

    @property
    def empty(self) -> bool:
        return not self._files

    def trouble(self, node_id: str, kind: str, name: str) -> str | None:
        """Why the node had better not try to bring the file just now."""
        known = self._troubles.get((node_id, kind, name))
        if known is None or known[0] <= self._clock():
            return None
        return known[1]

    def subscribe(self, listener: Callable[[], None]) -> None:
        """Calls `listener()` when the list has changed; it must not wait."""
        self._listeners.append(listener)

    async def look_up(self, name: str, kinds: tuple[str, ...] = ("checkpoint", "lora")) -> ShelfFile | None:
        """The file of that name; one that is not known is looked for in the buckets first. Raises S3_UNAVAILABLE."""
        found = self._find(name, kinds)
        if found is None:
            await self.refresh()
            found = self._find(name, kinds)
        return found

    def _find(self, name: str, kinds: tuple[str, ...]) -> ShelfFile | None:
        return next((file for kind in kinds if (file := self.find(kind, name)) is not None), None)

    def missed(self) -> None:
        """A name was asked for that is nowhere: the buckets are looked at soon, so that the next try may find it."""
        self._hurry.set()

    # What others learn.

    def blame(self, node_id: str, file: ShelfFile, detail: str, seconds: float) -> None:
        """The node could not bring the file: for so long it is not asked again."""
        now = self._clock()
        self._troubles = {key: known for key, known in self._troubles.items() if known[0] > now}
        self._troubles[node_id, file.kind, file.name] = now + seconds, detail

    def learn(self, kind: str, name: str, etag: str, sha256: str) -> None:
        """The file of that version has this hash."""
        file = self._files.get((kind, name))
        if file is not None and file.etag == etag and not file.sha256:
            self._files[kind, name] = replace(file, sha256=sha256)
            self._unsaved = True

    # Refreshing.

    async def run(self) -> None:
        """Until cancelled."""
        await asyncio.to_thread(self._load)
        if not self._s3.on:
            return
        self._s3.on_back(self._hurry.set)
        while True:
            with contextlib.suppress(FleetError):
                await self.refresh()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._settings.refresh_seconds):
                    await self._hurry.wait()
                    # However many hurry it.
                    await asyncio.sleep(self._settings.least_seconds)
            self._hurry.clear()

    async def refresh(self) -> None:
        """Lists both buckets now; a list that comes meanwhile is waited for instead. Raises S3_UNAVAILABLE."""
        before = self.refreshes
        async with self._refreshing:
            if self.refreshes > before + 1:
                # It began after this call did.
                return
            files: dict[Key, ShelfFile] = {}
            for kind, bucket in BUCKET_OF.items():
                for file in await self._listed(kind, bucket):
                    files[kind, file.name] = file
            await self._replace(files)
            self.refreshes += 1

    async def _listed(self, kind: str, bucket: str) -> list[ShelfFile]:
        found: list[ObjectStat] = []
        after = ""
        while len(found) < self._settings.files:
            page = await self._s3.list(bucket, "", after, self._settings.page)
            found += [one for one in page if one.key.endswith(".safetensors")]
            if len(page) < self._settings.page:
                break
            after = page[-1].key
        readers = asyncio.Semaphore(self._settings.readers)

        async def read(one: ObjectStat) -> ShelfFile | None:
            async with readers:
                return await self._file(kind, one)

        files = await asyncio.gather(*(read(one) for one in found[: self._settings.files]))
        return [file for file in files if file is not None]

    async def _file(self, kind: str, seen: ObjectStat) -> ShelfFile | None:
        """What the list says of an object; its header is read where its version is not known yet."""
        known = self._files.get((kind, seen.key))
        if known is not None and (known.etag, known.size_bytes) == (seen.etag, seen.size_bytes):
            return known
        if self._refused.get((kind, seen.key)) == seen.etag:
            return None
        try:
            if len(seen.key) > 255 or not _NAME.fullmatch(seen.key):
                raise BadHeaderError("its name is none that nodes take: letters, digits and . _ - + at most 255")
            header = await self._header(seen)
            stat = await self._s3.stat(seen.bucket, seen.key)
        except BadHeaderError as error:
            self._refused[kind, seen.key] = seen.etag
            _log.warning("an object is no model", bucket=seen.bucket, key=seen.key, why=str(error))
            return None
        except NoObjectError:
            return None
        sha256 = "" if stat is None or stat.etag != seen.etag else stat.metadata.get("sha256", "")
        return ShelfFile(
            seen.key,
            kind,
            seen.size_bytes,
            seen.etag,
            sha256 if re.fullmatch("[0-9a-f]{64}", sha256) else "",
            header.architecture,
            header.trigger_words,
        )

    async def _header(self, seen: ObjectStat) -> ModelHeader:
        """One small read, two where the header is long."""
        first = await self._part(seen, 0, min(_GUESS_BYTES, seen.size_bytes))
        length = header_length(first, seen.size_bytes)
        end = LENGTH_BYTES + length
        if end > len(first):
            first += await self._part(seen, len(first), end)
        if len(first) < end:
            raise BadHeaderError("it ended before its header did")
        return await asyncio.to_thread(read_header, first[LENGTH_BYTES:end], seen.size_bytes)

    async def _part(self, seen: ObjectStat, start: int, end: int) -> bytes:
        async with aclosing(self._s3.stream(seen.bucket, seen.key, start, end)) as chunks:
            return b"".join([chunk async for chunk in chunks])

    async def _replace(self, files: dict[Key, ShelfFile]) -> None:
        changed = files != self._files
        self._files = files
        present = {(kind, name) for kind, name in files}
        self._refused = {key: etag for key, etag in self._refused.items() if key not in present}
        if changed:
            for listener in tuple(self._listeners):
                listener()
        if changed or self._unsaved:
            self._unsaved = False
            with contextlib.suppress(OSError):
                await asyncio.to_thread(self._save, list(files.values()))

    # Over a restart.

    def _load(self) -> None:
        try:
            rows = orjson.loads(self._path.read_bytes())
            files = [ShelfFile(**{**row, "trigger_words": tuple(row["trigger_words"])}) for row in rows]
        except FileNotFoundError:
            return
        except (OSError, ValueError, TypeError, KeyError) as error:
            _log.warning("the kept list of models is unreadable and left out", why=repr(error))
            return
        if not self._files:
            self._files = {(file.kind, file.name): file for file in files}

    def _save(self, files: list[ShelfFile]) -> None:
        aside = self._path.with_suffix(".new")
        aside.write_bytes(orjson.dumps([asdict(file) for file in files]))
        aside.replace(self._path)
