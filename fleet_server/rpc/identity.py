"""Which node is calling, by the certificate of its connection, and what a node may call at all."""

from __future__ import annotations

import datetime as dt
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import grpc
from cryptography import x509
from cryptography.x509.oid import NameOID

from fleet_server.domain.errors import Code, FleetError
from fleet_server.services.authority import IDENTITY_PREFIX

NODE_METHODS = frozenset(
    f"/fleet.v1.{name}"
    for name in (
        "Node/Connect",
        "Node/UploadOutput",
        "Node/ServeCommand",
        "Node/ReadFile",
        "Node/RenewCertificate",
    )
)
"""All that a node may call with its certificate; what of it concerns others is refused in each."""


class NodeIdentity(NamedTuple):
    """What a certificate says of its node."""

    node_id: str
    identity: str
    expires: dt.datetime


class Identities(Protocol):
    """Knows which identities are still good: services.joins."""

    async def check(self, node_id: str, identity: str) -> None:
        """Raises CERTIFICATE_REFUSED."""
        ...


def identity_of(context: grpc.aio.ServicerContext[Any, Any]) -> NodeIdentity | None:
    """The node behind the connection, None for one without a certificate. The handshake has verified its chain.

    Raises CERTIFICATE_REFUSED for a certificate of ours that is no node's, or that has expired since.
    """
    pems = context.auth_context().get("x509_pem_cert")
    if not pems:
        return None
    found = _read(next(iter(pems)))
    if found is None or found.expires <= dt.datetime.now(dt.UTC):
        raise FleetError(
            "CERTIFICATE_REFUSED",
            "the certificate is no node's, or has expired: join with a token (fleet nodes token)",
            code=Code.UNAUTHENTICATED,
        )
    return found


@lru_cache(maxsize=4096)
def _read(pem: bytes) -> NodeIdentity | None:
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, x509.ExtensionNotFound):
        return None
    uris = [uri for uri in names.get_values_for_type(x509.UniformResourceIdentifier) if uri.startswith(IDENTITY_PREFIX)]
    common = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    if len(uris) != 1 or len(common) != 1:
        return None
    node_id = common[0].value
    if not isinstance(node_id, str):
        return None
    return NodeIdentity(node_id, uris[0].removeprefix(IDENTITY_PREFIX), certificate.not_valid_after_utc)
