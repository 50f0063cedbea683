"""What a callback address may be, judged at submit from its text alone; delivery judges what it resolves to."""

from __future__ import annotations

import ipaddress
import re
import socket
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from fleet_server.domain.errors import FleetError, Violation, invalid_field

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_VISIBLE = re.compile(r"[!-~]+")
_HOST = re.compile(
    r"(?=.{1,253}$)(?:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?)(?:\.[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?)*"
)
_NUMBER = re.compile(r"(?:[0-9]+|0x[0-9a-f]*)")
_LOOPBACK_NAMES = frozenset({"localhost", "localhost.localdomain", "ip6-localhost", "ip6-loopback"})
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_COMPATIBLE = ipaddress.IPv6Network("::/96")
_METADATA = frozenset({ipaddress.ip_address("fd00:ec2::254"), ipaddress.ip_address("100.100.100.200")})
_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class CallbackRules:
    """Which addresses callbacks may name. Link-local and metadata addresses never pass.

    `loopback` allows the machine itself, but for `own_ports`; inside the networks `allowed` private addresses pass.
    """

    loopback: bool = False
    own_ports: frozenset[int] = frozenset()
    allowed: tuple[Network, ...] = ()


def check_callback(url: str, rules: CallbackRules, *, field: str = "callback_url") -> None:
    """Returns if `url` may be called at a job's end.

    Raises INVALID_FIELD for what is no plain http(s) address, CALLBACK_FORBIDDEN for an address that `rules` refuse.
    """
    parts, host, port = _split(url, field)
    literal = _literal(host, field)
    if literal is None:
        name = host.removesuffix(".")
        if name in _LOOPBACK_NAMES or name.endswith(".localhost"):
            _loopback(port or _PORTS[parts.scheme], rules, field)
        return
    address = _embedded(literal)
    if _always_forbidden(literal) or _always_forbidden(address):
        raise _forbidden(field, f"{literal} may never be called")
    if any(address in network for network in rules.allowed if network.version == address.version):
        return
    if address.is_loopback:
        _loopback(port or _PORTS[parts.scheme], rules, field)
    elif not address.is_global:
        raise _forbidden(field, f"{literal} is private: its network must be named in FLEET_CALLBACK_ALLOW")


def without_query(url: str) -> str:
    """The address as it is shown: its query string may carry secrets."""
    return re.split(r"[?#]", url, maxsplit=1)[0]


def _split(url: str, field: str) -> tuple[SplitResult, str, int | None]:
    # urlsplit drops tabs and newlines silently; other readers of the same text would not.
    if not _VISIBLE.fullmatch(url) or "\\" in url:
        raise invalid_field(field, "must be visible ASCII characters without backslashes")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise invalid_field(field, "must be a http or https address such as https://example.com/hook") from None
    if parts.scheme not in _PORTS:
        raise invalid_field(field, "must begin with http:// or https://")
    if "@" in parts.netloc:
        raise invalid_field(field, "must not hold a user name or a password")
    if not parts.hostname:
        raise invalid_field(field, "must name a host")
    if port == 0:
        raise invalid_field(field, "must have a port from 1 to 65535")
    return parts, parts.hostname, port


def _literal(host: str, field: str) -> Address | None:
    """The address that `host` spells, in any of the forms that resolvers read; None for a name."""
    if ":" in host:
        try:
            if "%" in host:
                raise ValueError(host)
            return ipaddress.IPv6Address(host)
        except ValueError:
            raise invalid_field(field, "must name a host, an IPv4 or an IPv6 address without zone") from None
    name = host.removesuffix(".")
    if not _HOST.fullmatch(name):
        raise invalid_field(field, "must name a host by letters, digits, hyphens and dots")
    if not _NUMBER.fullmatch(name.rsplit(".", 1)[-1]):
        return None
    try:
        return ipaddress.IPv4Address(socket.inet_aton(name))
    except OSError:
        raise invalid_field(field, "must name a host or a whole IPv4 address") from None


def _embedded(address: Address) -> Address:
    """The IPv4 address inside an IPv6 one that carries it, else the address."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address.sixtofour is not None:
            return address.sixtofour
        if address.teredo is not None:
            return address.teredo[1]
        low = int(address) & 0xFFFFFFFF
        if address in _NAT64 or (address in _COMPATIBLE and low > 1):
            return ipaddress.IPv4Address(low)
    return address


def _always_forbidden(address: Address) -> bool:
    if address.is_link_local or address.is_multicast or address.is_unspecified or address in _METADATA:
        return True
    if isinstance(address, ipaddress.IPv4Address):
        return address.is_reserved or int(address) >> 24 == 0
    return False


def _loopback(port: int, rules: CallbackRules, field: str) -> None:
    if not rules.loopback:
        raise _forbidden(field, "the server's own machine may not be called; FLEET_CALLBACK_ALLOW can allow it")
    if port in rules.own_ports:
        raise _forbidden(field, "the server's own ports may not be called")


def _forbidden(field: str, description: str) -> FleetError:
    return FleetError("CALLBACK_FORBIDDEN", f"{field}: {description}", violations=[Violation(field, description)])
