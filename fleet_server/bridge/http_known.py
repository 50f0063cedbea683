"""Request lines and header sections that came before.

A client sends nearly the same headers with each request, and many requests to the same path. What is the same, byte
for byte, says the same: it need not be parsed again, and what follows from the line alone (what answers the path) or
from the headers alone (such as the metadata of a call) can be kept beside it. Only plain requests are recognized: one
at a time, come whole, in HTTP/1.1, with a body of a given length or none. Everything else takes the way through the
parser.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from fleet_server.bridge.errors import Header

_MAX_KEPT = 256
_MAX_SECTION_BYTES = 2048
_MAX_LINE_BYTES = 512
_END = b"\r\n\r\n"
_LINE = re.compile(rb"(GET|POST|PUT|PATCH|DELETE|HEAD) (/[A-Za-z0-9/._~!$&'()*+,;=:@%?-]*) HTTP/1\.1")
_NOT_KEPT = frozenset({b"connection", b"proxy-connection", b"transfer-encoding", b"upgrade", b"expect", b"trailer"})
"""Headers that say how the connection is to be read; `Connection: keep-alive` alone may stand."""


class KnownHead:
    """A header section that came before. `notes` takes what others make of it, each under a key of its own: only what
    follows from these headers alone, so that it stays true."""

    __slots__ = ("fields", "headers", "length", "notes")

    def __init__(self, headers: list[Header], length: int) -> None:
        self.headers = headers.copy()
        self.fields: Mapping[bytes, bytes] = dict(headers)
        self.length = length
        self.notes: dict[Any, Any] = {}


class KnownLine:
    """A plain request line in its parts. `notes` as those of a KnownHead: what follows from this line alone."""

    __slots__ = ("method", "notes", "path", "query", "raw_path")

    def __init__(self, method: bytes, target: bytes) -> None:
        self.method = method.decode("ascii")
        self.raw_path, _, self.query = target.partition(b"?")
        path = self.raw_path.decode("ascii")
        self.path = unquote(path) if "%" in path else path
        self.notes: dict[Any, Any] = {}


PlainRequest = tuple[KnownLine, KnownHead, bytes]
"""Line, header section and body of a request that was recognized."""


class KnownHeads:
    """The lines and header sections that a server got of late. A line and its headers take at most `max_bytes`."""

    __slots__ = ("_heads", "_lines", "_max_bytes")

    def __init__(self, max_bytes: int) -> None:
        self._heads: dict[bytes, KnownHead] = {}
        self._lines: dict[bytes, KnownLine] = {}
        self._max_bytes = max_bytes

    def recognize(self, data: bytes) -> PlainRequest | None:
        """The request that `data` is as a whole, if its header section is known; `data` begins where a request does."""
        line_end = data.find(b"\r\n")
        end = data.find(_END, line_end)
        if end < 0 or end + len(_END) > self._max_bytes:
            return None
        head = self._heads.get(data[line_end:end])
        if head is None or len(data) != end + len(_END) + head.length:
            return None
        line = self._lines.get(data[:line_end]) or self._read_line(data[:line_end])
        if line is None:
            return None
        return line, head, data[end + len(_END) :]

    def _read_line(self, text: bytes) -> KnownLine | None:
        match = _LINE.fullmatch(text)
        if match is None:
            return None
        line = KnownLine(*match.groups())
        if len(text) <= _MAX_LINE_BYTES:
            if len(self._lines) >= _MAX_KEPT:
                self._lines.clear()
            self._lines[text] = line
        return line

    def learn(self, data: bytes, headers: list[Header]) -> None:
        """Keeps the header section that `data` begins with, which the parser has read as `headers`, if it is plain."""
        line_end = data.find(b"\r\n")
        end = data.find(_END, line_end)
        section = data[line_end:end]
        if end < 0 or len(section) > _MAX_SECTION_BYTES or _LINE.fullmatch(data, 0, line_end) is None:
            return
        # One line for each header, no other ends of lines: the parser has seen the end where we see it.
        if not section.count(b"\n") == section.count(b"\r") == section.count(b"\r\n") == len(headers):
            return
        length = 0
        for name, value in headers:
            if name == b"content-length":
                if length or not value.isdigit() or len(value) > 9:
                    return
                length = int(value)
            elif name in _NOT_KEPT and (name != b"connection" or value.lower() != b"keep-alive"):
                return
        if len(self._heads) >= _MAX_KEPT:
            self._heads.clear()
        self._heads[section] = KnownHead(headers, length)
