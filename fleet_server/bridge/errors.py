"""Errors over HTTP: the status of a FleetError, its headers and the one body shape of every call."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import orjson

from fleet_server.domain.errors import Code, FleetError, RangeNotSatisfiableError, Violation

STATUS_BY_CODE: Final[Mapping[Code, int]] = MappingProxyType(
    {
        Code.CANCELLED: 499,
        Code.UNKNOWN: 500,
        Code.INVALID_ARGUMENT: 400,
        Code.DEADLINE_EXCEEDED: 504,
        Code.NOT_FOUND: 404,
        Code.ALREADY_EXISTS: 409,
        Code.PERMISSION_DENIED: 403,
        Code.RESOURCE_EXHAUSTED: 429,
        Code.FAILED_PRECONDITION: 409,
        Code.ABORTED: 409,
        Code.OUT_OF_RANGE: 416,
        Code.UNIMPLEMENTED: 501,
        Code.INTERNAL: 500,
        Code.UNAVAILABLE: 503,
        Code.DATA_LOSS: 500,
        Code.UNAUTHENTICATED: 401,
    }
)
"""HTTP status by gRPC code, where the reason has none of its own."""

STATUS_BY_REASON: Final[Mapping[str, int]] = MappingProxyType(
    {
        "METHOD_NOT_ALLOWED": 405,
        "REQUEST_TIMEOUT": 408,
        "BODY_TOO_LARGE": 413,
        "UNSUPPORTED_MEDIA_TYPE": 415,
        "HEADERS_TOO_LARGE": 431,
    }
)
"""Reasons whose status HTTP knows more exactly than their code."""

JSON_MEDIA_TYPE: Final = b"application/json"

Header = tuple[bytes, bytes]


class MethodNotAllowedError(FleetError):
    """METHOD_NOT_ALLOWED with the value of the `Allow` header."""

    def __init__(self, detail: str, allow: str) -> None:
        super().__init__("METHOD_NOT_ALLOWED", detail)
        self.allow = allow


def status_of(error: FleetError) -> int:
    """The HTTP status of an error."""
    return STATUS_BY_REASON.get(error.reason) or STATUS_BY_CODE[error.code]


def error_body(error: FleetError, request_id: str) -> bytes:
    """The error object, as JSON: `detail`, `code`, `reason`, `request_id`, `violations`."""
    return orjson.dumps(
        {
            "detail": _clean(error.detail),
            "code": error.code.name,
            "reason": error.reason,
            "request_id": request_id,
            "violations": [_violation(violation) for violation in error.violations],
        }
    )


def error_reply(error: FleetError, request_id: str) -> tuple[int, bytes, list[Header]]:
    """Status, body and headers (content type, Retry-After, Allow, Content-Range) of an error."""
    headers: list[Header] = [(b"content-type", JSON_MEDIA_TYPE)]
    if error.retry_after_seconds is not None:
        seconds = max(1, math.ceil(error.retry_after_seconds))
        headers.append((b"retry-after", str(seconds).encode()))
    if error.reason == "REQUEST_TIMEOUT":  # what is left of the body can no longer be told from a next request
        headers.append((b"connection", b"close"))
    if isinstance(error, RangeNotSatisfiableError):
        headers.append((b"content-range", b"bytes */%d" % error.size_bytes))
    if isinstance(error, MethodNotAllowedError):
        headers.append((b"allow", error.allow.encode()))
    return status_of(error), error_body(error, request_id), headers


def _violation(violation: Violation) -> dict[str, str]:
    return {"field": _clean(violation.field), "description": _clean(violation.description)}


def _clean(text: str) -> str:
    """`text` without lone surrogates, which JSON cannot carry."""
    return text.encode("utf-8", "replace").decode()
