"""HTTP's conditional and range requests over one immutable file. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fleet_server.domain.errors import RangeNotSatisfiableError

_RANGE = re.compile(r"bytes=[ \t]*(?:([0-9]{1,18})-([0-9]{0,18})|-([0-9]{1,18}))[ \t]*")
_TAG = re.compile(r'(?:W/)?("[^"]*")')


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes from `start` to before `end` of `size`; `partial` if the caller asked for a part."""

    start: int
    end: int
    size: int
    partial: bool

    @property
    def content_range(self) -> str:
        return f"bytes {self.start}-{self.end - 1}/{self.size}"


def unchanged(if_none_match: str | None, etag: str) -> bool:
    """Whether the caller has the file already."""
    if if_none_match is None:
        return False
    return if_none_match.strip() == "*" or etag in _TAG.findall(if_none_match)


def span_of(range_header: str | None, if_range: str | None, etag: str, size: int) -> Span:
    """The bytes to send. Several ranges, other units and what makes no sense count as no range, as HTTP has it.

    Raises RANGE_NOT_SATISFIABLE where the range begins past the end.
    """
    whole = Span(0, size, size, False)
    if range_header is None or (if_range is not None and if_range.strip() != etag):
        return whole
    match = _RANGE.fullmatch(range_header)
    if match is None:
        return whole
    if match[3] is not None:
        start, end = max(0, size - int(match[3])), size
    else:
        start = int(match[1])
        end = min(size, int(match[2]) + 1) if match[2] else size
        if match[2] and int(match[2]) < start:
            return whole
    if start >= size:
        words = f"Range: begins past the end of the file, which has {size} bytes"
        raise RangeNotSatisfiableError(words, size)
    return Span(start, end, size, True)
