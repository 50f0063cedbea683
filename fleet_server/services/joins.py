"""Machines that become nodes: join tokens, certificates, and whether a certificate is still worth something."""

from __future__ import annotations

import base64
import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass

import structlog

from fleet_server.domain.errors import Code, FleetError, invalid_field
from fleet_server.services.authority import Authority, Issued, read_request
from fleet_server.store.joins import JoinStore

_log = structlog.get_logger("fleet.joins")
TOKEN_SECONDS = 15 * 60
TOKEN_PREFIX = "fjt1."


@dataclass(frozen=True, slots=True)
class JoinToken:
    """What a machine needs to join; `expire_ms` is Unix time."""

    token: str
    ca_sha256: str
    expire_ms: int


class Joins:
    """Every method raises FleetError. `doors` are the addresses (host:port) that a token tells agents to dial,
    `agents_port` is where they go with their certificates."""

    def __init__(
        self,
        store: JoinStore,
        authority: Authority,
        doors: Sequence[str] = (),
        *,
        token_seconds: float = TOKEN_SECONDS,
    ) -> None:
        self._store = store
        self._authority = authority
        self.doors = doors
        self.agents_port = 0
        self._token_seconds = token_seconds

    async def token(self) -> JoinToken:
        """A fresh token, for one machine, for a quarter of an hour."""
        secret = secrets.token_urlsafe(16)
        await self._store.mint(secret, int(self._token_seconds * 1000))
        content = {"k": secret, "c": self._authority.sha256, "s": list(self.doors)}
        text = base64.urlsafe_b64encode(json.dumps(content, separators=(",", ":")).encode()).rstrip(b"=").decode()
        _log.info("join token made")
        return JoinToken(TOKEN_PREFIX + text, self._authority.sha256, int((time.time() + self._token_seconds) * 1000))

    async def join(self, secret: str, node_id: str, request: bytes) -> Issued:
        """The certificate of the node that this machine is from now on. Raises as the store's `join`, INVALID_FIELD."""
        _, key = _read(request)
        identity = await self._store.join(secret, node_id, key, secrets.token_hex(16))
        _log.info("node joined", node_id=node_id)
        return self._authority.for_node(node_id, identity, request)

    async def renew(self, node_id: str, identity: str, request: bytes) -> Issued:
        """A fresh certificate of a node that has shown its old one. Raises as `check`, INVALID_FIELD."""
        _read(request)
        await self.check(node_id, identity)
        return self._authority.for_node(node_id, identity, request)

    async def check(self, node_id: str, identity: str) -> None:
        """Raises CERTIFICATE_REFUSED (UNAUTHENTICATED) where the node was deleted, or has joined anew since."""
        known = await self._store.identity(node_id)
        if known is None or not secrets.compare_digest(known, identity):
            _log.warning("certificate of a deleted node", node_id=node_id)
            raise FleetError(
                "CERTIFICATE_REFUSED",
                f"the node {node_id} was deleted or has joined anew: join again with a token (fleet nodes token)",
                code=Code.UNAUTHENTICATED,
            )


def _read(request: bytes) -> tuple[object, str]:
    try:
        return read_request(request)
    except ValueError as error:
        raise invalid_field("certificate_request", f"must be a PEM certificate request: {error}") from None
