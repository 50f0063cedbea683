"""What a callback address may be: judged at submit from its text alone, at each delivery by what it resolves to."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
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
_CARRIERS = (ipaddress.IPv6Network("64:ff9b::/96"), ipaddress.IPv6Network("::ffff:0:0:0/96"))
# Local translators, SRv6 and documentation: not every Python that we run on knows these as private.
_PRIVATE = (
    ipaddress.IPv6Network("64:ff9b:1::/48"),
    ipaddress.IPv6Network("5f00::/16"),
    ipaddress.IPv6Network("3fff::/20"),
)
_COMPATIBLE = ipaddress.IPv6Network("::/96")
_METADATA = frozenset({ipaddress.ip_address("fd00:ec2::254"), ipaddress.ip_address("100.100.100.200")})
_LOOPBACK = ipaddress.IPv4Address("127.0.0.1")
_PORTS = {"http": 80, "https": 443}


# Where other services than HTTP listen by custom: a POST there could be read as theirs (the ports that browsers refuse
# too, and the stores that speak lines of text).
_FOREIGN_PORTS = frozenset({
    1, 7, 9, 11, 13, 15, 17, 19, 20, 21, 22, 23, 25, 37, 42, 43, 53, 69, 77, 79, 87, 95, 101, 102, 103, 104,
    109, 110, 111, 113, 115, 117, 119, 123, 135, 137, 139, 143, 161, 179, 389, 427, 465, 512, 513, 514, 515,
    526, 530, 531, 532, 540, 548, 554, 556, 563, 587, 601, 636, 989, 990, 993, 995, 1719, 1720, 1723, 2049,
    3659, 4045, 4190, 5060, 5061, 6000, 6379, 6566, 6665, 6666, 6667, 6668, 6669, 6679, 6697, 10080, 11211,
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class CallbackRules:
    """Which addresses callbacks may go to. Link-local and metadata addresses never pass.

    `public` allows what the whole internet can reach, `loopback` the machine itself; inside the networks `allowed`
    private addresses pass too. `own_ports` on loopback or on `own_addresses` are the server's: never.
    """

    loopback: bool = False
    own_ports: AbstractSet[int] = frozenset()
    allowed: tuple[Network, ...] = ()
    public: bool = True
    own_addresses: AbstractSet[Address] = frozenset()


def allow_rules(
    words: Sequence[str],
    *,
    own_ports: AbstractSet[int] = frozenset(),
    own_addresses: AbstractSet[Address] = frozenset(),
) -> CallbackRules:
    """The rules that FLEET_CALLBACK_ALLOW spells: `public`, `loopback`, addresses and networks (10.0.0.0/8).

    Raises ValueError for any other word.
    """
    networks: list[Network] = []
    for word in words:
        if word not in ("public", "loopback"):
            try:
                networks.append(ipaddress.ip_network(word))
            except ValueError:
                wanted = "use public, loopback, addresses and networks such as 10.0.0.0/8"
                raise ValueError(f"{wanted}; got {word!r}") from None
    return CallbackRules("loopback" in words, own_ports, tuple(networks), "public" in words, own_addresses)


def check_callback(url: str, rules: CallbackRules, *, field: str = "callback_url") -> None:
    """Returns if `url` may be called at a job's end, as far as its text tells: names are judged at delivery.

    Raises INVALID_FIELD for what is no plain http(s) address, CALLBACK_FORBIDDEN for an address that `rules` refuse.
    """
    receiver = parse_receiver(url, field=field)
    refusal = None
    if receiver.literal is not None:
        refusal = refusal_of(receiver.literal, receiver.port, rules)
    elif receiver.host in _LOOPBACK_NAMES or receiver.host.endswith(".localhost"):
        refusal = refusal_of(_LOOPBACK, receiver.port, rules)
    if refusal is not None:
        raise FleetError("CALLBACK_FORBIDDEN", f"{field}: {refusal}", violations=[Violation(field, refusal)])


@dataclass(frozen=True, slots=True)
class Receiver:
    """Whom a callback address names: `host` in small letters without a final dot, `literal` where it is an address."""

    scheme: str
    host: str
    port: int
    literal: Address | None


def parse_receiver(url: str, *, field: str = "callback_url") -> Receiver:
    """Raises INVALID_FIELD for what is no plain http(s) address."""
    parts, host, port = _split(url, field)
    literal = _literal(host, field)
    return Receiver(parts.scheme, host.removesuffix("."), port or _PORTS[parts.scheme], literal)


def refusal_of(address: Address, port: int, rules: CallbackRules) -> str | None:
    """Why this address may not be called, for people; None if it may. Says nothing of the address itself."""
    inner = _embedded(address)
    if _always_forbidden(address) or _always_forbidden(inner):
        return "link-local, metadata, multicast and reserved addresses may never be called"
    own = inner.is_loopback or inner in rules.own_addresses
    if own and port in rules.own_ports:
        return "the server's own ports may not be called"
    if port in _FOREIGN_PORTS:
        return f"port {port} belongs to another protocol than HTTP"
    if any(inner in network for network in rules.allowed if network.version == inner.version):
        return None
    if inner.is_loopback:
        return (
            None if rules.loopback else "the server's own machine may not be called; FLEET_CALLBACK_ALLOW can allow it"
        )
    if not inner.is_global or any(inner in network for network in _PRIVATE if network.version == inner.version):
        return "a private address may be called only where FLEET_CALLBACK_ALLOW names its network"
    return None if rules.public else "public addresses may not be called; FLEET_CALLBACK_ALLOW can allow them"


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
        if any(address in carrier for carrier in _CARRIERS) or (address in _COMPATIBLE and low > 1):
            return ipaddress.IPv4Address(low)
    return address


def _always_forbidden(address: Address) -> bool:
    if address.is_link_local or address.is_multicast or address.is_unspecified or address in _METADATA:
        return True
    if isinstance(address, ipaddress.IPv4Address):
        return address.is_reserved or int(address) >> 24 == 0
    return False
