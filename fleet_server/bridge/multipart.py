"""A multipart/form-data body with one file part, read as it comes: the part's bytes, its media type and its name."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from fleet_server.domain.errors import FleetError

_MEDIA_TYPE = b"multipart/form-data"
_LONGEST_BOUNDARY = 70


def is_multipart(content_type: bytes | None) -> bool:
    """Whether a body of this type holds parts."""
    return content_type is not None and content_type.partition(b";")[0].strip().lower() == _MEDIA_TYPE


class FilePart:
    """The one file part of a body. `filename` and `content_type` are known once the first chunk has come out."""

    def __init__(self, content_type: bytes) -> None:
        _, options = parse_options_header(content_type)
        boundary = options.get(b"boundary", b"")
        if not 1 <= len(boundary) <= _LONGEST_BOUNDARY:
            raise _malformed("its Content-Type must name a boundary of 1 to 70 characters")
        self.filename = ""
        self.content_type = b"application/octet-stream"
        self._parts = 0
        self._ended = False
        self._out: list[bytes] = []
        self._name = b""
        self._value = b""
        self._headers: dict[bytes, bytes] = {}
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._on_begin,
                "on_header_field": self._on_field,
                "on_header_value": self._on_value,
                "on_header_end": self._on_header,
                "on_headers_finished": self._on_headers,
                "on_part_data": self._on_data,
                "on_end": self._on_end,
            },
        )

    async def chunks(self, body: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        """The bytes of the part, at least one chunk.

        Raises INVALID_FIELD for what is no multipart, or has not just one part, and that a file.
        """
        first = True
        async for chunk in body:
            try:
                self._parser.write(chunk)
            except MultipartParseError as error:
                raise _malformed("it is no whole multipart/form-data") from error
            if self._out:
                data, self._out = b"".join(self._out), []
                yield data
                first = False
        if not self._ended:
            raise _malformed("it is no whole multipart/form-data")
        if not self._parts:
            raise _one_file()
        if first:
            yield b""

    # What the parser finds.

    def _on_begin(self) -> None:
        self._parts += 1
        if self._parts > 1:
            raise _one_file()

    def _on_field(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _on_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header(self) -> None:
        self._headers[self._name.lower()] = self._value
        self._name = self._value = b""

    def _on_headers(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        if b"filename" not in options:
            raise _one_file()
        self.filename = options[b"filename"].decode("utf-8", "replace")
        self.content_type = self._headers.get(b"content-type", self.content_type)

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        self._out.append(data[start:end])

    def _on_end(self) -> None:
        self._ended = True


def _malformed(words: str) -> FleetError:
    return FleetError("INVALID_FIELD", f"body: {words}")


def _one_file() -> FleetError:
    return _malformed("a multipart body must have one part, a file: send the bytes alone, or one part with a filename")
