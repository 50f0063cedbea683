"""`InProcContext`: a grpc.aio.ServicerContext for a call that came over HTTP and is served in this process."""

from __future__ import annotations

import base64
import binascii
import functools
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NoReturn

import grpc
import grpc.aio

from fleet_server.bridge.asgi import HEAD_EXTENSION
from fleet_server.bridge.status import error_from_status
from fleet_server.domain.errors import FleetError

_FORWARDED: Final[Mapping[bytes, str]] = {
    name.encode(): name
    for name in (
        *("x-api-key", "authorization", "idempotency-key", "range", "if-none-match", "if-range", "last-event-id"),
        *("user-agent", "traceparent", "tracestate", "accept"),
    )
}
"""Request headers that servicers see under their own names."""

_PREFIX: Final = b"grpc-metadata-"
_OWN: Final = frozenset({*_FORWARDED.values(), "x-request-id", "fleet-transport"})
_TIMEOUT: Final = re.compile(rb"([0-9]{1,8})([HMSmun])")
_UNIT_SECONDS: Final = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}

Metadata = Sequence[tuple[str, str | bytes]]


def parse_timeout(value: bytes) -> float:
    """Seconds of a `Grpc-Timeout` header (`30S`, `500m`). Raises FleetError INVALID_FIELD."""
    match = _TIMEOUT.fullmatch(value)
    if match is None:
        raise FleetError(
            "INVALID_FIELD", "Grpc-Timeout: must be 1 to 8 digits and a unit H, M, S, m, u or n, such as 30S"
        )
    return int(match[1]) * _UNIT_SECONDS[match[2]]


class InProcContext(grpc.aio.ServicerContext[Any, Any]):
    """The context of one call. `timeout_seconds` is the caller's deadline, None where there is none.

    Initial metadata becomes HTTP headers. `on_initial_metadata` is called when it is sent, once. `abort` and
    `abort_with_status` raise FleetError, with reason, violations and retry time from `google.rpc.Status` details where
    the trailing metadata carries them. `read` and `write` are not offered: servicers use iterators and generators.
    """

    __slots__ = (
        "_callbacks",
        "_cancelled",
        "_code",
        "_deadline",
        "_details",
        "_done",
        "_headers",
        "_metadata",
        "_scope",
        "_trailing",
        "initial_metadata",
        "on_initial_metadata",
        "request_id",
    )

    def __init__(self, scope: Mapping[str, Any], request_id: str, timeout_seconds: float | None) -> None:
        self._scope = scope
        self.request_id = request_id
        self.initial_metadata: Metadata | None = None
        self.on_initial_metadata: Callable[[], None] | None = None
        self._deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        self._metadata: tuple[tuple[str, str | bytes], ...] | None = None
        self._trailing: Metadata = ()
        self._code: grpc.StatusCode | None = None
        self._details = ""
        self._callbacks: list[Callable[[Any], None]] | None = None
        self._cancelled = False
        self._done = False

    def invocation_metadata(self) -> tuple[tuple[str, str | bytes], ...]:  # type: ignore[override]
        """The request's metadata, lower-case keys: forwarded headers, x-request-id, fleet-transport."""
        if self._metadata is None:
            found: list[tuple[str, str | bytes]] = [("fleet-transport", "rest"), ("x-request-id", self.request_id)]
            for name, value in self._scope["headers"]:
                key = _FORWARDED.get(name)
                if key is not None:
                    found.append((key, value.decode("latin-1")))
                elif name.startswith(_PREFIX):
                    found.extend(_custom(name[len(_PREFIX) :].decode("latin-1"), value))
            self._metadata = tuple(found)
        return self._metadata

    def text_metadata(self) -> dict[str, str]:
        """A new dict of the metadata that is text, of a name given twice the first: what nearly every call wants of it,
        without the way over pairs."""
        known = (self._scope.get("extensions") or {}).get(HEAD_EXTENSION)
        if known is None:
            return _text_metadata(self._scope["headers"], self.request_id)
        found: dict[str, str] | None = known.notes.get(InProcContext)
        if found is None:
            found = known.notes[InProcContext] = _text_metadata(known.headers, "")
        return {**found, "x-request-id": self.request_id}

    def peer(self) -> str:
        """The caller's address in gRPC's form: `ipv4:127.0.0.1:4711`, `ipv6:[::1]:4711`, `unix:`."""
        client = self._scope.get("client")
        return _peer(*client) if client else "unix:"

    def time_remaining(self) -> float | None:  # type: ignore[override]
        """Seconds until the caller's deadline, never below 0; None where there is none."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    async def send_initial_metadata(self, initial_metadata: Any) -> None:
        """Set the reply's headers; over HTTP they go out with the first message, a stream's at once."""
        if self.initial_metadata is not None:
            raise grpc.aio.UsageError("send_initial_metadata failed: it was sent already")
        self.initial_metadata = tuple(initial_metadata)
        if self.on_initial_metadata is not None:
            self.on_initial_metadata()

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()) -> NoReturn:
        """Raise the FleetError of a status."""
        self._code, self._details = code, details
        if trailing_metadata:
            self._trailing = tuple(trailing_metadata)
        raise error_from_status(code, details, self._trailing)

    async def abort_with_status(self, status: grpc.Status) -> NoReturn:
        """Raise the FleetError of a status object (`rpc_status.to_status`)."""
        await self.abort(status.code, status.details, status.trailing_metadata or ())

    def failure(self) -> FleetError | None:
        """The error that the servicer set with `set_code` in place of raising one."""
        if self._code is None or self._code is grpc.StatusCode.OK:
            return None
        return error_from_status(self._code, self._details, self._trailing)

    def set_trailing_metadata(self, trailing_metadata: Any) -> None:
        """Keep the trailing metadata; over HTTP only its status details are used."""
        self._trailing = tuple(trailing_metadata)

    def trailing_metadata(self) -> Any:
        """The trailing metadata as set."""
        return self._trailing

    def set_code(self, code: grpc.StatusCode) -> None:
        """Set the status; one other than OK is answered as an error."""
        self._code = code

    def code(self) -> grpc.StatusCode:
        """The status set so far, OK where none was."""
        return self._code or grpc.StatusCode.OK

    def set_details(self, details: str) -> None:
        """Set the status message."""
        self._details = details

    def details(self) -> str:
        """The status message set so far."""
        return self._details

    def done(self) -> bool:
        """Whether the call has ended."""
        return self._done

    def cancelled(self) -> bool:
        """Whether the caller went away, or the call was cancelled otherwise."""
        return self._cancelled

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        """Call `callback(context)` when the call ends, at once where it has ended."""
        if self._done:
            callback(self)
            return
        if self._callbacks is None:
            self._callbacks = []
        self._callbacks.append(callback)

    def finish(self, *, cancelled: bool = False) -> None:
        """End the call (the bridge does so once): done callbacks run."""
        self._done = True
        self._cancelled = cancelled
        callbacks, self._callbacks = self._callbacks, None
        for callback in callbacks or ():
            callback(self)

    def peer_identities(self) -> Iterable[bytes] | None:
        """None: HTTP callers are known by their key, not by a certificate."""
        return None

    def peer_identity_key(self) -> str | None:
        """None, as peer_identities."""
        return None

    def auth_context(self) -> Mapping[str, Iterable[bytes]]:
        """Empty, as peer_identities."""
        return {}

    def set_compression(self, compression: grpc.Compression) -> None:
        """Nothing: HTTP replies are not compressed."""

    def disable_next_message_compression(self) -> None:
        """Nothing, as set_compression."""

    async def read(self) -> Any:
        """Not offered. Raises UsageError."""
        raise grpc.aio.UsageError("read is not offered here: iterate over the request")

    async def write(self, message: Any) -> None:
        """Not offered. Raises UsageError."""
        raise grpc.aio.UsageError("write is not offered here: make the method an async generator")


def _text_metadata(headers: Iterable[tuple[bytes, bytes]], request_id: str) -> dict[str, str]:
    found = {"fleet-transport": "rest", "x-request-id": request_id}
    for name, value in headers:
        key = _FORWARDED.get(name)
        if key is not None:
            if key not in found:
                found[key] = value.decode("latin-1")
        elif name.startswith(_PREFIX):
            for custom, given in _custom(name[len(_PREFIX) :].decode("latin-1"), value):
                if isinstance(given, str):
                    found.setdefault(custom, given)
    return found


@functools.lru_cache(maxsize=1024)
def _peer(host: str, port: int) -> str:
    return f"ipv6:[{host}]:{port}" if ":" in host else f"ipv4:{host}:{port}"


def _custom(key: str, value: bytes) -> list[tuple[str, str | bytes]]:
    """Metadata of a `Grpc-Metadata-*` header; names that the bridge sets itself cannot be given so."""
    if not key or key in _OWN or key.startswith("grpc-"):
        return []
    if not key.endswith("-bin"):
        return [(key, value.decode("latin-1"))]
    try:
        return [(key, base64.b64decode(value + b"=" * (-len(value) % 4), validate=True))]
    except binascii.Error:
        return []
