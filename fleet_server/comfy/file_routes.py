"""view and upload: files by ComfyUI's names."""

from __future__ import annotations

import asyncio
import hashlib
import mimetypes
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing
from typing import Any
from urllib.parse import quote, urlencode

import orjson
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from fleet_server.comfy import pictures
from fleet_server.comfy.parts import ComfyParts
from fleet_server.comfy.replies import empty, json_reply, who_of
from fleet_server.domain.comfy import FileName
from fleet_server.domain.errors import FleetError, invalid_field
from fleet_server.services.comfy_files import file_name
from fleet_server.services.comfy_prompts import Who
from fleet_server.services.comfy_views import untagged

Json = Any
_CHUNK = 1 << 20
_SHOWN = ("image/", "video/", "audio/")
_FIELD_BYTES = 1 << 20
_OTHER = "application/octet-stream"


class FileRoutes:
    """Each public method is one route."""

    def __init__(self, parts: ComfyParts) -> None:
        self._parts = parts
        self._files = parts.files
        self._threads = asyncio.Semaphore(2)

    # view

    async def view(self, request: Request) -> Response:
        query = request.query_params
        if "filename" not in query:
            return empty(404)
        name = FileName.of(query["filename"])
        if name.name == query["filename"] or not query["filename"].endswith("]"):
            name = FileName(query["filename"], "", query.get("type", "output"))
        try:
            name = file_name(name.name, query.get("subfolder", name.subfolder), name.type)
        except FleetError as error:
            return empty(403 if error.detail.startswith("subfolder") else 400)
        found = await self._found(request, name, who_of(request))
        if found is None:
            return empty(404)
        if "preview" in query or query.get("channel", "rgba") != "rgba":
            return await self._changed(found, query.get("preview"), query.get("channel", "rgba"))
        return found

    async def _found(self, request: Request, name: FileName, who: Who) -> Response | None:
        if name.type == "input" or untagged(name.name) is None:
            return await self._uploaded(name, who)
        filename = await self._files.output(name, only=who.only)
        if filename is None:
            return await self._on_its_node(name, who)
        try:
            found = await self._parts.downloads.download(filename, width=None, headers=request.headers)
        except FleetError as error:
            if error.reason == "OUTPUT_NOT_FOUND":
                return None
            raise
        headers = dict(found.headers) | {"content-disposition": disposition(name.name)}
        headers["content-type"] = safe_type(found.content_type)
        # Whose it is may change who sees it, so that no shared cache keeps it.
        headers["cache-control"] = "private, max-age=31536000, immutable"
        return StreamingResponse(found.chunks(), found.status, headers)

    async def _uploaded(self, name: FileName, who: Who) -> Response | None:
        known = await self._files.uploaded(who.owner, name)
        if known is None:
            return None
        headers = {
            "content-disposition": disposition(name.name),
            "content-type": safe_type(known.content_type),
            "content-length": str(known.size_bytes),
            "etag": f'"{known.sha256}"',
            "x-content-type-options": "nosniff",
        }
        chunks = self._files.read(known.reference)
        try:
            # Before the head: its time may be over by now, and then it is not there.
            first = await anext(chunks, b"")
        except FleetError as error:
            if error.reason == "INPUT_NOT_FOUND":
                return None
            raise
        return StreamingResponse(_begun(first, chunks), 200, headers)

    async def _on_its_node(self, name: FileName, who: Who) -> Response | None:
        """A file of a prompt that still runs: its node has it. Only what the prompt has made: others' lie beside it."""
        tag = untagged(name.name)
        prompt = await self._parts.prompts.get(tag[0], who) if tag is not None else None
        if tag is None or prompt is None or prompt.record.state.ended or not prompt.record.node_id:
            return None
        live = self._parts.tracker.live(prompt.prompt_id)
        made = live.files if live is not None else set()
        for text in (text for text in tag[1] if (text, name.subfolder, name.type) in made):
            target = "/view?" + urlencode({"filename": text, "subfolder": name.subfolder, "type": name.type})
            stack = AsyncExitStack()
            try:
                answer = await stack.enter_async_context(self._parts.nodes.ask(prompt.record.node_id, "GET", target))
            except FleetError:
                await stack.aclose()
                return None
            if answer.status == 200:
                headers = {"content-disposition": disposition(name.name), "x-content-type-options": "nosniff"}
                headers["content-type"] = safe_type(answer.content_type)
                return StreamingResponse(_closing(stack, answer.body), 200, headers)
            await stack.aclose()
        return None

    async def _changed(self, found: Response, form: str | None, which: str) -> Response:
        if found.status_code >= 300:
            return found
        assert isinstance(found, StreamingResponse)
        data = b"".join([chunk if isinstance(chunk, bytes) else bytes(chunk) async for chunk in found.body_iterator])  # type: ignore[arg-type]
        most = self._parts.settings.picture_pixels
        headers = {"content-disposition": found.headers["content-disposition"], "x-content-type-options": "nosniff"}
        try:
            if form is not None:
                kind, _, quality = form.partition(";")
                kind = kind if kind in ("webp", "jpeg") else "webp"
                level = min(100, max(1, int(quality))) if quality.isdigit() else 90
                made = await self._in_thread(lambda: pictures.preview(data, kind, level, most_pixels=most))
                return Response(made, 200, headers | {"content-type": f"image/{kind}"})
            if which not in ("rgb", "a"):
                return empty(400)
            made = await self._in_thread(lambda: pictures.channel(data, which, most_pixels=most))
            return Response(made, 200, headers | {"content-type": "image/png"})
        except pictures.NotAPictureError:
            return empty(400)

    # upload

    async def upload_image(self, request: Request) -> Response:
        async def as_it_is(form: FormData, image: UploadFile, who: Who) -> UploadFile:
            return image

        return await self._upload(request, as_it_is)

    async def upload_mask(self, request: Request) -> Response:
        """The picture that `original_ref` names, with the alpha of the one that is sent."""
        return await self._upload(request, self._masked)

    async def _upload(
        self, request: Request, change: Callable[[FormData, UploadFile, Who], Awaitable[UploadFile]]
    ) -> Response:
        who, limit = who_of(request), self._parts.settings.upload_bytes
        _bound(request, limit + _FIELD_BYTES)
        try:
            form = await request.form(max_files=1, max_fields=20, max_part_size=_FIELD_BYTES)
        except MultiPartException as error:
            raise invalid_field("body", f"must be a form with a file ({error.message})") from None
        try:
            image = form.get("image")
            if not isinstance(image, UploadFile) or not image.filename:
                return empty(400)
            if (image.size or 0) > limit:
                raise FleetError("BODY_TOO_LARGE", f"image: at most {limit:,} bytes are taken here")
            kind, subfolder = str(form.get("type") or "input"), str(form.get("subfolder") or "")
            try:
                name = file_name(image.filename, subfolder, kind)
            except FleetError:
                return empty(400)
            changed = await change(form, image, who)
            overwrite = str(form.get("overwrite", "")).lower() in ("true", "1")
            sha256 = await self._in_thread(lambda: _hash(changed))
            content_type = image.content_type or mimetypes.guess_type(name.name)[0] or _OTHER
            kept = await self._files.upload(
                who.owner, name, _chunks(changed), sha256=sha256, content_type=content_type, overwrite=overwrite
            )
        finally:
            await form.close()
        return json_reply({"name": kept.name, "subfolder": kept.subfolder, "type": kept.type})

    async def _masked(self, form: FormData, image: UploadFile, who: Who) -> UploadFile:
        try:
            reference = orjson.loads(str(form.get("original_ref") or "null"))
            original = file_name(
                str(reference["filename"]),
                str(reference.get("subfolder") or ""),
                str(reference.get("type") or "output"),
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            raise invalid_field("original_ref", "must be JSON with filename, subfolder and type") from None
        found = await self._files.reference(who.owner, original)
        if found is None:
            raise FleetError("INPUT_NOT_FOUND", f"original_ref: there is no file {original.name!r}")
        below = b"".join([chunk async for chunk in self._files.read(found)])
        mask = await image.read()
        most = self._parts.settings.picture_pixels
        try:
            made = await self._in_thread(lambda: pictures.with_alpha_of(below, mask, most_pixels=most))
        except pictures.NotAPictureError as error:
            raise invalid_field("image", f"must be a picture ({error})") from None
        await image.seek(0)
        image.file.truncate()
        await image.write(made)
        await image.seek(0)
        return image

    async def _in_thread(self, work: Callable[[], Any]) -> Any:
        async with self._threads:
            return await asyncio.to_thread(work)


def disposition(filename: str) -> str:
    """The header that names a file, as ComfyUI writes it; names that are no ASCII also as RFC 6266 wants them."""
    plain = filename.replace("\\", "_").replace('"', "'")
    if plain.isascii():
        return f'filename="{plain}"'
    return f"filename=\"{plain.encode('ascii', 'replace').decode()}\"; filename*=UTF-8''{quote(filename, safe='')}"


def safe_type(content_type: str) -> str:
    """A type that no browser takes for a page or a script of ours."""
    kind = content_type.partition(";")[0].strip().lower()
    return kind if kind.startswith(_SHOWN) and kind != "image/svg+xml" else _OTHER


def _bound(request: Request, limit: int) -> None:
    """Makes reading the body fail once it has more than `limit` bytes."""
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > limit:
        raise FleetError("BODY_TOO_LARGE", f"at most {limit:,} bytes are taken here")
    receive, came = request._receive, 0

    async def counted() -> Any:
        nonlocal came
        message = await receive()
        came += len(message.get("body", b""))
        if came > limit:
            raise FleetError("BODY_TOO_LARGE", f"at most {limit:,} bytes are taken here")
        return message

    request._receive = counted


def _hash(file: UploadFile) -> str:
    digest = hashlib.sha256()
    file.file.seek(0)
    while chunk := file.file.read(_CHUNK):
        digest.update(chunk)
    file.file.seek(0)
    return digest.hexdigest()


async def _chunks(file: UploadFile) -> AsyncIterator[bytes]:
    await file.seek(0)
    while chunk := await file.read(_CHUNK):
        yield chunk


async def _begun(first: bytes, chunks: AsyncGenerator[bytes, None]) -> AsyncIterator[bytes]:
    """What was read already, and the rest."""
    async with aclosing(chunks):
        yield first
        async for chunk in chunks:
            yield chunk


async def _closing(stack: AsyncExitStack, body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    async with stack:
        async for chunk in body:
            yield chunk
