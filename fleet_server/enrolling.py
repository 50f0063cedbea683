"""How agents come to this server: plain on loopback, over TLS elsewhere, and with certificates of our own authority."""

from __future__ import annotations

import datetime as dt
import ipaddress
import socket
import threading
from collections.abc import Sequence

import grpc
import psutil
import structlog

from fleet_server.rpc.scopes import Scope
from fleet_server.rpc.server import GrpcServer, Tls
from fleet_server.services.authority import Authority, Pair
from fleet_server.services.joins import Joins
from fleet_server.services.relay import CHANNEL_OPTIONS
from fleet_server.settings import Settings
from fleet_server.store import Store

_log = structlog.get_logger("fleet.enrol")
OPEN_SCOPES = frozenset({Scope.READ, Scope.SUBMIT, Scope.CANCEL})
"""What --insecure-no-auth leaves open to everybody."""


class Enrolment:
    """The agents' doors. Raises AuthorityError where the files of the authority cannot be used."""

    def __init__(self, settings: Settings, store: Store) -> None:
        self._settings = settings
        self.joins: Joins | None = None
        self.open_scopes: frozenset[Scope] = OPEN_SCOPES if settings.insecure_no_auth else frozenset()
        self._tls: Tls | None = None
        if settings.tls_on:
            authority = Authority.open(settings.pki_folder, node_days=settings.certificate_days)
            self.joins = Joins(store.joins, authority)
            self._tls = Tls(ServerPair(authority, _names(settings)).now, authority.pem)
        self.agents_port: int | None = None

    async def open(self, server: GrpcServer) -> int:
        """Opens the doors; the port of the one for everybody. Raises OSError whose text names port and flag."""
        settings = self._settings
        host = _host(settings.host)
        try:
            port = await server.listen(f"{host}:{settings.grpc_port}", tls=self._tls)
        except OSError as error:
            raise OSError(_taken(settings.grpc_port, "--grpc-port (FLEET_GRPC_PORT)")) from error
        if self._tls is not None and self.joins is not None:
            try:
                self.agents_port = await server.listen(
                    f"{host}:{settings.agents_port}", tls=self._tls, certificates=True
                )
            except OSError as error:
                raise OSError(_taken(settings.agents_port, "--agents-port (FLEET_AGENTS_PORT)")) from error
            self.joins.doors = _doors(settings, port)
            self.joins.agents_port = self.agents_port
            _log.info("agents join over TLS", doors=self.joins.doors, agents_port=self.agents_port)
        await server.start()
        return port

    def door(self, port: int) -> str:
        """Where other servers of the fleet dial this one."""
        return _doors(self._settings, port)[0]

    def dial(self, door: str) -> grpc.aio.Channel:
        """A channel to another server of the fleet, which shares our authority where there is one."""
        if self._tls is None:
            return grpc.aio.insecure_channel(door, options=list(CHANNEL_OPTIONS))
        trust = grpc.ssl_channel_credentials(root_certificates=self._tls.authority)
        return grpc.aio.secure_channel(door, trust, options=list(CHANNEL_OPTIONS))

    def own_agent(self, port: int) -> dict[str, str]:
        """Where the agent beside this server finds it, as variables of its environment."""
        host = self._settings.host
        near = "127.0.0.1" if self._settings.loopback or _is_any(host) else _host(host)
        found = {"FLEET_AGENT_SERVER": f"{near}:{port}"}
        if self._tls is not None:
            found["FLEET_AGENT_CA_FILE"] = str(self._settings.pki_folder / "ca.pem")
        return found


class ServerPair:
    """This server's certificate, made when it is first asked for and again long before it ends."""

    def __init__(self, authority: Authority, names: Sequence[str]) -> None:
        self._authority = authority
        self._names = names
        self._lock = threading.Lock()
        self._pair: Pair | None = None

    def now(self) -> Pair:
        """The pair to show; asked at each handshake, in a thread of gRPC."""
        with self._lock:
            soon = dt.datetime.now(dt.UTC) + dt.timedelta(days=90)
            if self._pair is None or self._pair.expires < soon:
                self._pair = self._authority.for_server(self._names)
            return self._pair


def _names(settings: Settings) -> list[str]:
    """What this machine is called, by whoever dials it."""
    found = ["localhost", "127.0.0.1", "::1", socket.gethostname(), *settings.tls_names, *_addresses()]
    found += [settings.host] if not _is_any(settings.host) else []
    return list(dict.fromkeys(found + [door.rpartition(":")[0].strip("[]") or door for door in settings.advertise]))


def _doors(settings: Settings, port: int) -> list[str]:
    """Where a token tells agents to dial: as settings say, else all addresses that are listened on."""
    if settings.advertise:
        return [door if _has_port(door) else f"{_host(door)}:{port}" for door in settings.advertise]
    if not _is_any(settings.host):
        return [f"{_host(settings.host)}:{port}"]
    return [f"{_host(address)}:{port}" for address in _addresses()] or [f"127.0.0.1:{port}"]


def _addresses() -> list[str]:
    """Addresses of this machine that others could dial."""
    found = []
    for addresses in psutil.net_if_addrs().values():
        for one in addresses:
            if one.family in (socket.AF_INET, socket.AF_INET6) and "%" not in one.address:
                address = ipaddress.ip_address(one.address)
                if not (address.is_loopback or address.is_link_local):
                    found.append(str(address))
    return found


def _has_port(door: str) -> bool:
    return door.rpartition(":")[2].isdigit() and (door.count(":") == 1 or "]" in door)


def _host(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def _is_any(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def _taken(port: int, flag: str) -> str:
    return f"port {port} cannot be listened on: stop what uses it, or give another with {flag}"
