"""How the embedded S3 answers: errors with their codes, replies, lists as XML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import formatdate
from urllib.parse import quote
from xml.sax.saxutils import escape

from fleet_server.embedded.s3_shelf import Item

XML = "application/xml"
_NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"


class Refusal(Exception):  # noqa: N818 (an answer, not a fault)
    """An S3 error: its status, its code and words."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(f"{code}: {message}")
        self.status = status
        self.code = code
        self.message = message
        self.headers = dict(headers or {})


def not_implemented(what: str) -> Refusal:
    """For everything that S3 has and we have not: better refused than half done."""
    return Refusal(501, "NotImplemented", f"{what} is not supported by this server")


def no_key() -> Refusal:
    """There is no such object."""
    return Refusal(404, "NoSuchKey", "The specified key does not exist.")


def no_bucket() -> Refusal:
    """There is no such bucket."""
    return Refusal(404, "NoSuchBucket", "The specified bucket does not exist.")


@dataclass(frozen=True, slots=True)
class Answer:
    """A reply: bytes, or `length` bytes of `blob` from `start` on."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    blob: int | None = None
    start: int = 0
    length: int = 0


def xml(root: str, inner: str, *, status: int = 200) -> Answer:
    """A reply of XML; `inner` is escaped already."""
    text = f'<?xml version="1.0" encoding="UTF-8"?>\n<{root} xmlns="{_NAMESPACE}">{inner}</{root}>'
    return Answer(status, text.encode(), {"Content-Type": XML})


def refused(refusal: Refusal, resource: str) -> Answer:
    """The reply for a refusal."""
    text = (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<Error>{tag("Code", refusal.code)}'
        f"{tag('Message', refusal.message)}{tag('Resource', resource)}</Error>"
    )
    return Answer(refusal.status, text.encode(), {"Content-Type": XML, **refusal.headers})


def tag(name: str, value: object) -> str:
    """One element with text."""
    return f"<{name}>{escape(str(value))}</{name}>"


def iso(ms: int) -> str:
    """A time as S3's XML has it."""
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%S.") + f"{ms % 1000:03d}Z"


def http_date(ms: int) -> str:
    """A time as headers have it."""
    return formatdate(ms / 1000, usegmt=True)


def object_headers(item: Item) -> dict[str, str]:
    """What HEAD and GET say of an object, but for its length."""
    return {
        "ETag": f'"{item.etag}"',
        "Last-Modified": http_date(item.modified_ms),
        "Accept-Ranges": "bytes",
        "X-Content-Type-Options": "nosniff",
        **item.headers,
    }


def contents(items: Sequence[Item], *, encode: bool) -> str:
    """Entries of a list."""
    return "".join(
        "<Contents>"
        + tag("Key", name(item.key, encode=encode))
        + tag("LastModified", iso(item.modified_ms))
        + tag("ETag", f'"{item.etag}"')
        + tag("Size", item.size)
        + "<StorageClass>STANDARD</StorageClass></Contents>"
        for item in items
    )


def name(key: str, *, encode: bool) -> str:
    """A key as lists have it."""
    return quote(key, safe="/") if encode else key
