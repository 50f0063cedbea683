"""Refuses requests that a browser was tricked into sending: DNS rebinding and cross-site requests.

The guard is the outermost ASGI application, for HTTP and WebSockets alike, and decides on the scope's
headers alone, before any routing. Nothing here replaces keys: it is what protects a server that needs none.
"""

from __future__ import annotations

import functools
import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import uuid_utils
from starlette.types import ASGIApp, Receive, Scope, Send

from fleet_server.bridge.asgi import HEAD_EXTENSION
from fleet_server.bridge.errors import Header, error_reply
from fleet_server.domain.errors import FleetError

_NAME: Final = re.compile(r"[a-z0-9_](?:[a-z0-9_-]*[a-z0-9_])?(?:\.[a-z0-9_](?:[a-z0-9_-]*[a-z0-9_])?)*\.?")
_AUTHORITY: Final = re.compile(r"(\[[0-9a-f:.]+\]|[^\[\]:@/?#\\%\s]+)(?::([0-9]{1,5}))?")
_DEFAULT_PORTS: Final = {"http": 80, "https": 443}
_REQUEST_ID: Final = re.compile(r"[\x21-\x7e]{1,128}")
_JUDGED: Final = frozenset({b"host", b"origin", b"sec-fetch-site", b"sec-fetch-mode", b"sec-fetch-dest"})
_MAX_ADMITTED: Final = 256  # what was admitted once, by what was judged
_MAX_SHOWN: Final = 100
_MAX_AUTHORITY: Final = 262  # the longest name, a dot, a port


@dataclass(frozen=True, slots=True)
class Authority:
    """A host in its one spelling, and the port where one was written."""

    host: str
    port: int | None


def parse_authority(text: str) -> Authority | None:
    """`host[:port]` as in Host and Origin; None where it is malformed.

    Names become lower case and lose one trailing dot; addresses get their canonical spelling, IPv6 without
    brackets and IPv4-mapped ones as IPv4. User information, zone ids, paths and percent escapes are
    malformed; other spellings of an address (`127.1`, `0x7f000001`) are names, and nobody's.
    """
    return _parse_authority(text.lower()) if len(text) <= _MAX_AUTHORITY else None


@functools.lru_cache(maxsize=256)
def _parse_authority(text: str) -> Authority | None:
    match = _AUTHORITY.fullmatch(text)
    if match is None:
        return None
    host, digits = match.groups()
    port = int(digits) if digits is not None else None
    if port is not None and not 0 < port < 65536:
        return None
    if host.startswith("["):
        address = _address(host[1:-1])
        return Authority(address, port) if address is not None and ":" in host else None
    if _NAME.fullmatch(host) is None or len(host) > 254:
        return None
    return Authority(host.removesuffix("."), port)


@functools.lru_cache(maxsize=256)
def _address(text: str) -> str | None:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)


@functools.lru_cache(maxsize=256)
def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class HostOriginGuard:
    """Passes on what a browser's owner meant to send; answers 403 to the rest.

    Host must be one valid header that names: this machine by a loopback name or address, the very address
    that the connection came in on, one of `bound_addresses`, or an entry of `allowed_hosts` (`name` for any
    port, `name:port`).

    Origin, where present, must be one header that is the server's own origin, an entry of `allowed_origins`
    (`scheme://host[:port]`, exact), or, with `loopback_bind`, any http(s) origin of this machine. `null` is
    refused. Without Origin, `Sec-Fetch-Site: cross-site` is refused unless it is a top-level GET
    navigation.

    The errors are HOST_FORBIDDEN and ORIGIN_FORBIDDEN and name `hosts_setting` and `origins_setting`. A
    WebSocket is refused before the upgrade, by an ordinary 403. Raises ValueError, naming the setting, for
    a malformed entry.
    """

    def __init__(
        self,
        app: ASGIApp,
        allowed_hosts: Iterable[str] = (),
        allowed_origins: Iterable[str] = (),
        *,
        bound_addresses: Iterable[str] = (),
        loopback_bind: bool = True,
        hosts_setting: str = "FLEET_ALLOWED_HOSTS",
        origins_setting: str = "FLEET_ALLOWED_ORIGINS",
    ) -> None:
        self._app = app
        self._hosts_setting = hosts_setting
        self._origins_setting = origins_setting
        self._loopback_bind = loopback_bind
        self._hosts = frozenset(self._configured_host(entry) for entry in allowed_hosts)
        self._origins = frozenset(self._configured_origin(entry) for entry in allowed_origins)
        self._admitted: set[tuple[Any, ...]] = set()
        self._bound = frozenset(map(_address, bound_addresses)) - {None, "0.0.0.0", "::"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            known = (scope.get("extensions") or {}).get(HEAD_EXTENSION)
            # What is admitted by Host alone is admitted at one address of ours.
            if known is None or known.notes.get(self, self) != scope.get("server"):
                try:
                    by_host_alone = self._judge(scope)
                except FleetError as error:
                    await _refuse(error, scope, receive, send)
                    return
                if known is not None and by_host_alone:
                    known.notes[self] = scope.get("server")
        await self._app(scope, receive, send)

    def _judge(self, scope: Scope) -> bool:
        """Raises FleetError for what is not admitted; whether what is came with Host alone, as all but browsers do."""
        judged = [header for header in scope["headers"] if header[0] in _JUDGED]
        server = scope.get("server")
        key = (*judged, server and tuple(server))
        if key in self._admitted:
            return True
        self._judge_headers(judged, scope)
        if len(judged) != 1:
            return False
        if len(self._admitted) >= _MAX_ADMITTED:
            self._admitted.clear()
        self._admitted.add(key)
        return True

    def _judge_headers(self, judged: list[Header], scope: Scope) -> None:
        hosts: list[bytes] = []
        origins: list[bytes] = []
        fetch: dict[bytes, list[bytes]] = {}
        for name, value in judged:
            if name == b"host":
                hosts.append(value)
            elif name == b"origin":
                origins.append(value)
            else:
                fetch.setdefault(name, []).append(value.lower())
        host = self._check_host(hosts, scope)
        if origins:
            self._check_origin(origins, host, scope)
        elif b"cross-site" in fetch.get(b"sec-fetch-site", ()) and not _is_navigation(fetch, scope):
            raise self._origin_error("this request comes from a page of another site")

    def _check_host(self, values: list[bytes], scope: Scope) -> Authority:
        text = values[0].decode("latin-1").strip() if values else ""
        host = parse_authority(text) if len(values) == 1 else None
        if host is None:
            what = "is missing" if not values else "came more than once" if len(values) > 1 else "is malformed"
            raise FleetError("HOST_FORBIDDEN", f"Host: {what}; send one Host header, as host or host:port")
        if not (self._is_own(host.host, scope) or {host, Authority(host.host, None)} & self._hosts):
            what = f"{_shown(text)} is not a name of this server"
            raise FleetError("HOST_FORBIDDEN", f"Host: {what}; add it to {self._hosts_setting} if it is one")
        return host

    def _is_own(self, host: str, scope: Scope) -> bool:
        """Whether `host` is this machine. The connection's local address counts: no name was there to rebind."""
        if _is_loopback(host) or host in self._bound:
            return True
        server = scope.get("server")
        return server is not None and server[1] is not None and _address(server[0]) == host

    def _check_origin(self, values: list[bytes], host: Authority, scope: Scope) -> None:
        text = values[0].decode("latin-1").strip()
        origin = _parse_origin(text) if len(values) == 1 else None
        if origin is None:
            raise self._origin_error(f"{_shown(text)} is no origin that could be allowed")
        scheme, authority = origin
        if origin in self._origins or (self._loopback_bind and _is_loopback(authority.host)):
            return
        secure = scope.get("scheme") in ("https", "wss")
        own = _with_port(scheme, host) == _with_port(scheme, authority)
        if not own or (secure and scheme == "http"):
            raise self._origin_error(f"pages of {_shown(text)} may not use this server")

    def _origin_error(self, what: str) -> FleetError:
        return FleetError(
            "ORIGIN_FORBIDDEN", f"Origin: {what}; add its origin to {self._origins_setting} if you trust it"
        )

    def _configured_host(self, entry: str) -> Authority:
        authority = parse_authority(entry if entry.count(":") < 2 or entry.startswith("[") else f"[{entry}]")
        if authority is None:
            raise ValueError(f"{self._hosts_setting}: {entry!r} is no host; write name, address, or either with :port")
        return authority

    def _configured_origin(self, entry: str) -> tuple[str, Authority]:
        origin = _parse_origin(entry)
        if origin is None:
            raise ValueError(f"{self._origins_setting}: {entry!r} is no origin; write https://host or http://host:port")
        return origin


def _parse_origin(text: str) -> tuple[str, Authority] | None:
    """Scheme and authority (its port always filled in) of an http(s) origin; else None."""
    scheme, found, rest = text.partition("://")
    scheme = scheme.lower()
    authority = parse_authority(rest) if found and scheme in _DEFAULT_PORTS else None
    return (scheme, _with_port(scheme, authority)) if authority is not None else None


def _with_port(scheme: str, authority: Authority) -> Authority:
    return Authority(authority.host, authority.port or _DEFAULT_PORTS[scheme])


def _is_navigation(fetch: dict[bytes, list[bytes]], scope: Scope) -> bool:
    """Whether somebody followed a link or typed an address: the page that linked learns nothing."""
    return (
        scope["type"] == "http"
        and scope["method"] in ("GET", "HEAD")
        and fetch.get(b"sec-fetch-mode") == [b"navigate"]
        and fetch.get(b"sec-fetch-dest") == [b"document"]
    )


def _shown(text: str) -> str:
    return ascii(text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "...")


async def _refuse(error: FleetError, scope: Scope, receive: Receive, send: Send) -> None:
    request_id = _request_id(scope)
    status, body, headers = error_reply(error, request_id)
    headers += [(b"content-length", str(len(body)).encode()), (b"x-request-id", request_id.encode())]
    kind = "http.response"
    if scope["type"] == "websocket":
        await receive()  # websocket.connect
        if "websocket.http.response" not in scope.get("extensions", {}):
            await send({"type": "websocket.close"})
            return
        kind = "websocket.http.response"
    await send({"type": f"{kind}.start", "status": status, "headers": headers})
    await send({"type": f"{kind}.body", "body": body})


def _request_id(scope: Scope) -> str:
    values: list[Any] = [value for name, value in scope["headers"] if name == b"x-request-id"]
    given = values[0].decode("latin-1") if len(values) == 1 else ""
    return given if _REQUEST_ID.fullmatch(given) else str(uuid_utils.uuid7())
