"""Who is calling: what `invoke` learned from a call's metadata, for the servicer behind it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, NamedTuple

import grpc

from fleet_server.domain.errors import FleetError, Violation

_EMPTY: Mapping[str, str] = MappingProxyType({})
_KEY = re.compile(r"[!-~]{1,128}\Z")


class Caller(NamedTuple):
    """The caller of the call under way.

    `owner` is the name of its key, "" without keys; names in `metadata` are lower-case. Who is no `admin` has an
    ordinary key.
    """

    owner: str = ""
    request_id: str = ""
    transport: str = "grpc"
    metadata: Mapping[str, str] = _EMPTY
    admin: bool = True
    node_id: str = ""
    """The node whose certificate the call came with; it acts for itself alone. "" for callers with keys or none."""
    identity: str = ""


NOBODY = Caller()
"""The caller of a call that was not let in."""

_current: ContextVar[Caller | None] = ContextVar("fleet_caller", default=None)


def set_caller(caller: Caller) -> None:
    """Makes `caller` the one of this task."""
    _current.set(caller)


def read_metadata(context: grpc.aio.ServicerContext[Any, Any]) -> dict[str, str]:
    """The call's text metadata; of a name given twice the first counts."""
    text_metadata = getattr(context, "text_metadata", None)  # a call over HTTP has it at hand
    if text_metadata is not None:
        at_hand: dict[str, str] = text_metadata()
        return at_hand
    found: dict[str, str] = {}
    for key, value in context.invocation_metadata() or ():
        if isinstance(value, str):
            found.setdefault(key, value)
    return found


def caller_of(context: grpc.aio.ServicerContext[Any, Any]) -> Caller:
    """The caller of the call under way; outside `invoke` (a servicer served bare) its metadata alone."""
    caller = _current.get()
    if caller is not None:
        return caller
    metadata = read_metadata(context)
    return Caller("", metadata.get("x-request-id", ""), metadata.get("fleet-transport", "grpc"), metadata)


def idempotency_key(context: grpc.aio.ServicerContext[Any, Any], request: Any) -> str | None:
    """The call's idempotency key, from `request_id` or the header Idempotency-Key.

    Raises INVALID_FIELD where both are given and differ, or the header is not 1 to 128 visible ASCII characters.
    """
    header = caller_of(context).metadata.get("idempotency-key")
    given: str | None = request.request_id if request.HasField("request_id") else None
    if header is None:
        return given
    if not _KEY.match(header):
        words = "must be 1 to 128 visible ASCII characters"
        raise FleetError("INVALID_FIELD", f"Idempotency-Key: {words}", violations=[Violation("Idempotency-Key", words)])
    if given is not None and given != header:
        words = "must be the same as the header Idempotency-Key, or be left out"
        raise FleetError("INVALID_FIELD", f"request_id: {words}", violations=[Violation("request_id", words)])
    return header
