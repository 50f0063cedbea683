"""Outputs as callers see them: the gallery, their bytes, their small pictures, their deletion."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass

from fleet.v1 import types_pb2, vision_pb2

from fleet_server.domain.errors import FleetError, invalid_field
from fleet_server.services.deletions import Deletions, Removal
from fleet_server.services.gallery_feed import SHOWN, GalleryFeed
from fleet_server.services.output_views import OutputViews
from fleet_server.services.pages import page_key_of, token_of
from fleet_server.services.ports import Files
from fleet_server.services.ranges import span_of, unchanged
from fleet_server.services.times import ceil_ms
from fleet_server.storage.gallery_index import Span
from fleet_server.storage.names import is_output_name
from fleet_server.storage.thumbnails import NotAPictureError, Thumbnails
from fleet_server.store import OutputRow, OutputStore

_AT_ONCE_BYTES = 8 << 20
_CHUNK_BYTES = 1 << 20
_IMMUTABLE = "public, max-age=31536000, immutable"


@dataclass(frozen=True, slots=True)
class Download:
    """An answer of bytes: HTTP status, headers (lower-case), and the chunks, which are read as they are asked for."""

    status: int
    headers: tuple[tuple[str, str], ...]
    content_type: str
    chunks: Callable[[], AsyncGenerator[bytes, None]]


class Gallery:
    """The index of outputs with the files behind it. What the index does not have is not there."""

    def __init__(
        self,
        outputs: OutputStore,
        files: Files,
        thumbnails: Thumbnails,
        views: OutputViews,
        feed: GalleryFeed,
        deletions: Deletions,
    ) -> None:
        self._outputs = outputs
        self._files = files
        self._thumbnails = thumbnails
        self._views = views
        self._feed = feed
        self._deletions = deletions

    async def output(self, filename: str) -> types_pb2.Output:
        """An output with metadata. Raises OUTPUT_NOT_FOUND."""
        return self._views.of(await self._row(filename))

    async def download(self, filename: str, *, width: int | None, headers: Mapping[str, str]) -> Download:
        """The bytes of an output, or of a WebP no wider than `width`; `headers` are those of the request.

        Raises OUTPUT_NOT_FOUND, RANGE_NOT_SATISFIABLE, and INVALID_FIELD for a width where there is no picture.
        """
        output = await self.output(filename)
        if width is not None:
            return await self._small(output, width, headers)
        etag = f'"{output.sha256}"'
        if unchanged(headers.get("if-none-match"), etag):
            return _not_modified(etag)
        span = span_of(headers.get("range"), headers.get("if-range"), etag, output.size_bytes)
        chunks = await self._chunks(output, span.start, span.end)
        sent = [
            *_common(output, etag),
            ("accept-ranges", "bytes"),
            ("content-length", str(span.end - span.start)),
            ("content-disposition", f'inline; filename="{filename}"'),
        ]
        if span.partial:
            sent.append(("content-range", span.content_range))
        return Download(206 if span.partial else 200, tuple(sent), output.content_type, chunks)

    async def _chunks(
        self, output: types_pb2.Output, start: int, end: int
    ) -> Callable[[], AsyncGenerator[bytes, None]]:
        """How to read a part of a file that is there: a missing one is a 404, not a broken body."""
        filename, size = output.filename, output.size_bytes
        if size > _AT_ONCE_BYTES:
            seen = await self._files.stat(filename)
            found = None if seen is None else seen.size_bytes
            chunks: Callable[[], AsyncGenerator[bytes, None]] = lambda: self._streamed(filename, start, end)  # noqa: E731
        else:
            data = await self._files.read(filename)
            found = None if data is None else len(data)
            chunks = lambda: _slices(data or b"", start, end)  # noqa: E731
        if found is None:
            raise _not_found()
        if found != size:
            raise FleetError("INTERNAL", f"the file {filename} has {found} bytes, but {size} were stored")
        return chunks

    async def _streamed(self, filename: str, start: int, end: int) -> AsyncGenerator[bytes, None]:
        chunks = self._files.stream(filename, start, end)
        try:
            async for chunk in chunks:
                yield chunk
        finally:
            if isinstance(chunks, AsyncGenerator):
                # Closes the file now, not when the collector comes by.
                await chunks.aclose()

    async def _small(self, output: types_pb2.Output, width: int, headers: Mapping[str, str]) -> Download:
        if not output.content_type.startswith("image/"):
            raise invalid_field("width", f"must be left out: {output.filename} is {output.content_type}, no picture")
        etag = f'"{output.sha256}-{width}"'
        if unchanged(headers.get("if-none-match"), etag):
            return _not_modified(etag)
        try:
            data = await self._thumbnails.get(output.filename, width, lambda: self._files.read(output.filename))
        except NotAPictureError as error:
            raise invalid_field("width", f"must be left out: {output.filename} is no picture ({error})") from error
        if data is None:
            raise _not_found()

        async def whole() -> AsyncGenerator[bytes, None]:
            yield data

        sent = (*_common(output, etag), ("content-length", str(len(data))))
        return Download(200, sent, "image/webp", whole)

    async def delete(self, filename: str) -> Removal:
        """Removes an output everywhere. Raises OUTPUT_NOT_FOUND.

        What cannot be reached now is removed as soon as it can be; nobody is shown it from now on.
        """
        removal = await self._deletions.delete(filename) if is_output_name(filename) else None
        if removal is None:
            raise _not_found()
        return removal

    async def star(self, filename: str, starred: bool) -> types_pb2.Output:
        """Gives an output a star, or takes it away; the output. Raises OUTPUT_NOT_FOUND."""
        row = await self._outputs.star(filename, starred) if is_output_name(filename) else None
        if row is None:
            raise _not_found()
        return self._views.of(row)

    async def _row(self, filename: str) -> OutputRow:
        row = await self._outputs.get(filename) if is_output_name(filename) else None
        if row is None:
            raise _not_found()
        return row

    async def list(self, request: vision_pb2.ListGalleryRequest) -> tuple[list[types_pb2.Output], str]:
        """A page of pictures and clips with metadata, newest first, and the next page's token.

        Costs one command of the store, however many outputs there are. Raises INVALID_PAGE_TOKEN.
        """
        marks = [SHOWN]
        if request.HasField("model"):
            marks.append(f"model:{request.model}")
        if request.HasField("node_id"):
            marks.append(f"node:{request.node_id}")
        if request.HasField("job_id"):
            marks.append(f"job:{request.job_id}")
        if request.HasField("starred"):
            marks.append(f"starred:{int(request.starred)}")
        outputs, following = await self._feed.page(_span(request), request.prompt, marks, request.limit)
        return outputs, token_of(request, following)


def _span(request: vision_pb2.ListGalleryRequest) -> Span:
    after_ms = ceil_ms(request.created_after) if request.HasField("created_after") else None
    before = page_key_of(request)
    if before is not None:
        return Span(before.time_ms, before.member, after_ms)
    if request.HasField("created_before"):
        return Span(ceil_ms(request.created_before), after_ms=after_ms)
    return Span(after_ms=after_ms)


def _common(output: types_pb2.Output, etag: str) -> list[tuple[str, str]]:
    sent = [
        ("etag", etag),
        ("cache-control", _IMMUTABLE),
        ("x-content-type-options", "nosniff"),
        ("x-filename", output.filename),
    ]
    if output.HasField("seed"):
        sent.append(("x-seed", str(output.seed)))
    return sent


async def _slices(data: bytes, start: int, end: int) -> AsyncGenerator[bytes, None]:
    for at in range(start, end, _CHUNK_BYTES):
        yield data[at : min(at + _CHUNK_BYTES, end)]


def _not_modified(etag: str) -> Download:
    async def nothing() -> AsyncGenerator[bytes, None]:
        return
        yield b""

    return Download(304, (("etag", etag), ("cache-control", _IMMUTABLE)), "", nothing)


def _not_found() -> FleetError:
    # The same words for what never was and what may not be named.
    return FleetError("OUTPUT_NOT_FOUND", "filename: there is no such output; see GET /api/vision/gallery")
