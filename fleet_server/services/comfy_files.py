"""Files as ComfyUI's clients name them: what they uploaded, and what their prompts made, on whatever node."""

from __future__ import annotations

import posixpath
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Any, Protocol

import orjson
from fleet.v1 import command_pb2, fleet_pb2
from google.api import httpbody_pb2

from fleet_server.domain.comfy import FileName
from fleet_server.domain.errors import invalid_field
from fleet_server.services.comfy_views import engine_result, is_prompt, untagged
from fleet_server.services.queue import not_theirs
from fleet_server.store import Store

_TYPES = frozenset({"input", "output", "temp"})
_MOST_NAMES = 10_000
_NAME_BYTES = 255


class Receives(Protocol):
    """Takes inputs: services.input_uploads."""

    async def receive(self, requests: AsyncIterator[fleet_pb2.UploadInputRequest]) -> fleet_pb2.UploadInputResponse:
        """The reference of a file that is safe now."""
        ...


class Reads(Protocol):
    """Reads files by reference: services.file_reader."""

    def read(self, request: command_pb2.ReadFileRequest) -> AsyncGenerator[command_pb2.ReadFileResponse, None]:
        """The size first, then the bytes."""
        ...


@dataclass(frozen=True, slots=True)
class Uploaded:
    """A file under ComfyUI's name."""

    name: FileName
    reference: str
    content_type: str
    size_bytes: int
    sha256: str


class ComfyFiles:
    """Names are each owner's own: what one uploads, no other sees or replaces."""

    def __init__(self, store: Store, receives: Receives, reads: Reads) -> None:
        self._store = store
        self._receives = receives
        self._reads = reads

    # Uploads.

    async def upload(
        self,
        owner: str,
        name: FileName,
        chunks: AsyncIterator[bytes],
        *,
        sha256: str,
        content_type: str,
        overwrite: bool,
    ) -> FileName:
        """Keeps a file; the name that it got. The same file again is the same file; another one under a name that is
        taken gets the next free ` (n)`, unless it is to overwrite.

        Raises INVALID_FIELD for names that cannot be, DISK_FULL, BODY_TOO_LARGE.
        """
        _judge(name)
        free = name
        if not overwrite:
            found, free = await self._free(owner, name, sha256)
            if found:
                return free
        reference = await self._receive(free.name, content_type, chunks)
        record = {"reference": reference, "sha256": sha256, "content_type": content_type}
        while not await self._store.comfy.put_file(owner, _key(free), orjson.dumps(record), only_new=not overwrite):
            # Somebody was faster.
            found, free = await self._free(owner, name, sha256)
            if found:
                break
        return free

    async def _free(self, owner: str, name: FileName, sha256: str) -> tuple[bool, FileName]:
        """The first name of the row that is free, or (True) that this very file has."""
        stem, dot, ending = name.name.rpartition(".")
        for number in range(_MOST_NAMES):
            suffix = f" ({number})" if number else ""
            text = f"{stem}{suffix}{dot}{ending}" if dot else f"{name.name}{suffix}"
            one = FileName(text, name.subfolder, name.type)
            known = await self.uploaded(owner, one)
            if known is None:
                if number and len(text.encode()) > _NAME_BYTES:
                    break
                return False, one
            if known.sha256 == sha256:
                return True, one
        raise invalid_field("image", "has a name that is taken too often: choose another")

    async def _receive(self, filename: str, content_type: str, chunks: AsyncIterator[bytes]) -> str:
        async def requests() -> AsyncIterator[fleet_pb2.UploadInputRequest]:
            first = True
            async for chunk in chunks:
                content = httpbody_pb2.HttpBody(data=chunk, content_type=content_type if first else "")
                yield fleet_pb2.UploadInputRequest(filename=filename if first else "", content=content)
                first = False

        return (await self._receives.receive(requests())).reference

    async def uploaded(self, owner: str, name: FileName) -> Uploaded | None:
        """The owner's file of that name; None where there is none, or it was kept long enough."""
        record = await self._store.comfy.file(owner, _key(name))
        if record is None:
            return None
        found: dict[str, Any] = orjson.loads(record)
        row = await self._store.inputs.get(found["reference"].partition(":")[2])
        if row is None:
            # The name is free again.
            await self._store.comfy.drop_file(owner, _key(name))
            return None
        return Uploaded(name, found["reference"], found["content_type"], row.size_bytes, found["sha256"])

    # What payloads call them.

    async def reference(self, owner: str, name: FileName) -> str | None:
        """What the file is called in payloads: an upload of the owner, or an output of a prompt of theirs."""
        if name.type == "input" or untagged(name.name) is None:
            known = await self.uploaded(owner, name)
            return None if known is None else known.reference
        filename = await self.output(name, only=owner or None)
        return None if filename is None else f"output:{filename}"

    async def output(self, name: FileName, *, only: str | None) -> str | None:
        """The fleet's name of a file that a prompt made; None where the caller may see none of that name."""
        found = untagged(name.name)
        if found is None:
            return None
        job_id, names = found
        record = await self._store.jobs.get(job_id)
        if record is None or not is_prompt(record) or not_theirs(record, only):
            return None
        outputs = engine_result(record).outputs
        for text in names:
            for one in outputs:
                if (one.file.filename, one.file.subfolder, one.file.type) == (text, name.subfolder, name.type):
                    return str(one.filename)
        return None

    async def read(self, reference: str) -> AsyncGenerator[bytes, None]:
        """The bytes of a file. Raises INPUT_NOT_FOUND before the first."""
        async for part in self._reads.read(command_pb2.ReadFileRequest(reference=reference)):
            if part.chunk:
                yield part.chunk


def file_name(name: str, subfolder: str, kind: str) -> FileName:
    """A name as it came in a request. Raises INVALID_FIELD for one that leads out of ComfyUI's folders."""
    folder = posixpath.normpath(subfolder.replace("\\", "/")) if subfolder else ""
    found = FileName(name, "" if folder == "." else folder, kind or "input")
    _judge(found)
    return found


def _judge(name: FileName) -> None:
    if name.type not in _TYPES:
        raise invalid_field("type", "must be input, output or temp")
    if name.subfolder.startswith(("/", "..")) or "\0" in name.subfolder or len(name.subfolder) > _NAME_BYTES:
        raise invalid_field("subfolder", "must lead no further than ComfyUI's own folder")
    text = name.name
    if not text or text in (".", "..") or "/" in text or "\\" in text or not text.isprintable():
        raise invalid_field("image", "must have a file name, without folders and control characters")
    if len(text.encode()) > _NAME_BYTES:
        raise invalid_field("image", f"has a name of more than {_NAME_BYTES} bytes")


def _key(name: FileName) -> str:
    return f"{name.type}/{name.subfolder}/{name.name}"
