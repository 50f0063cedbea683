"""Page tokens: opaque, bound to the call and its filters."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import orjson
from google.protobuf.message import Message

from fleet_server.domain.errors import FleetError, Violation
from fleet_server.store import PageKey

T = TypeVar("T")
_UNBOUND = ("limit", "page_token")
_MAX_MS = 1 << 53
_MAX_MEMBER = 512


def _refused() -> FleetError:
    words = "must be the next_page_token of the same call with the same filters; leave it out to begin again"
    return FleetError("INVALID_PAGE_TOKEN", f"page_token: {words}", violations=[Violation("page_token", words)])


def _fingerprint(request: Message) -> str:
    bound = type(request)()
    bound.CopyFrom(request)
    for name in _UNBOUND:
        bound.ClearField(name)
    # The name keeps a token of one list from being taken by another whose filters happen to encode alike.
    content = str(request.DESCRIPTOR.full_name).encode() + b"\0" + bound.SerializeToString(deterministic=True)
    return hashlib.sha256(content).hexdigest()[:16]


def token_for(request: Message, key: Sequence[str | int]) -> str:
    """A token that leads on after `key` in the list that `request` asks for."""
    return base64.urlsafe_b64encode(orjson.dumps([_fingerprint(request), *key])).rstrip(b"=").decode()


def key_of(request: Any) -> list[Any] | None:
    """The key inside `request.page_token`, None at the first page. Raises INVALID_PAGE_TOKEN."""
    token: str = request.page_token
    if not token:
        return None
    try:
        content = orjson.loads(base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True))
    except (binascii.Error, ValueError):
        raise _refused() from None
    if not isinstance(content, list) or len(content) < 2 or content[0] != _fingerprint(request):
        raise _refused()
    return content[1:]


def page_key_of(request: Any) -> PageKey | None:
    """The store's key inside `request.page_token`, None at the first page. Raises INVALID_PAGE_TOKEN."""
    key = key_of(request)
    if key is None:
        return None
    match key:
        case [int(time_ms), str(member)] if 0 <= time_ms < _MAX_MS and 0 < len(member) <= _MAX_MEMBER:
            return PageKey(time_ms, member)
    raise _refused()


def token_of(request: Message, key: PageKey | None) -> str:
    """The token for a page of the store, "" at the end."""
    return "" if key is None else token_for(request, (key.time_ms, key.member))


def page_by_name(request: Any, items: Iterable[T], name: Callable[[T], tuple[str, ...]]) -> tuple[list[T], str]:
    """One page of a list that is sorted by name and held in memory; the whole list where no limit is given.

    Rows that come or go between two pages move no other row to another page. Raises INVALID_PAGE_TOKEN.
    """
    rows = sorted(items, key=name)
    after = key_of(request)
    if after is not None:
        if not all(isinstance(part, str) for part in after):
            raise _refused()
        rows = [row for row in rows if name(row) > tuple(after)]
    if not request.HasField("limit") or len(rows) <= request.limit:
        return rows, ""
    rows = rows[: request.limit]
    return rows, token_for(request, name(rows[-1]))
