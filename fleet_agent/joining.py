"""How a machine becomes a node: by a token with the hash of the server's authority, so nobody can stand between."""

from __future__ import annotations

import asyncio
import hashlib
import ssl
from typing import Any

import grpc
import structlog
from fleet.v1 import node_pb2, node_pb2_grpc

from fleet_agent.identity import Door, Identity, IdentityError, Token, key_and_request

_log = structlog.get_logger("fleet.agent.join")
_CA_EXTENSION = "2.25.306420977236119428226893214926419053217"
"""Where the server's certificate carries the authority's own."""


async def join(token: Token, node_id: str, servers: tuple[str, ...] = (), *, seconds: float = 15) -> Identity:
    """Joins at the first of `servers` (else the token's) that answers. Raises IdentityError."""
    doors = servers or token.servers
    if not doors:
        raise IdentityError("--join: the token names no server: give its address with --server")
    key, request = key_and_request()
    causes = []
    for server in doors:
        try:
            async with asyncio.timeout(seconds):
                authority = await _authority(server, token.authority_sha256)
                return await _join(server, token, node_id, key, request, authority)
        except (OSError, TimeoutError, ssl.SSLError) as error:
            causes.append(f"{server}: {error or 'no answer'}")
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise IdentityError(f"{server} refuses: {error.details()}") from None
            causes.append(f"{server}: {error.details()}")
    raise IdentityError("no server could be reached: " + "; ".join(causes))


async def renew(door: Door, *, seconds: float = 30) -> Identity:
    """The identity with a fresh key and certificate. Raises grpc.aio.AioRpcError, TimeoutError."""
    assert door.identity is not None
    key, request = key_and_request()
    async with asyncio.timeout(seconds), door.channel([("grpc.use_local_subchannel_pool", 1)]) as channel:
        stub: Any = node_pb2_grpc.NodeStub(channel)
        reply = await stub.RenewCertificate(node_pb2.RenewCertificateRequest(certificate_request=request))
    return door.identity.renewed(key, reply.certificate.decode())


async def _join(server: str, token: Token, node_id: str, key: str, request: bytes, authority: str) -> Identity:
    door = Door(server, authority=authority.encode())
    async with door.channel([("grpc.use_local_subchannel_pool", 1)]) as channel:
        stub: Any = node_pb2_grpc.NodeStub(channel)
        asked = node_pb2.JoinRequest(secret=token.secret, node_id=node_id, certificate_request=request)
        reply = await stub.Join(asked)
    agents = f"{server.rpartition(':')[0]}:{reply.agents_port}"
    _log.info("joined", server=server, node_id=node_id)
    return Identity(node_id, server, agents, key, reply.certificate.decode(), authority)


async def _authority(server: str, sha256: str) -> str:
    """The certificate of the server's authority, PEM, if its hash is the token's. Raises IdentityError, OSError.

    Nothing is believed of who answers here: what it shows either has the hash, or is thrown away.
    """
    host, _, port = server.rpartition(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    if not port.isdigit():
        raise IdentityError(f"{server}: must be host:port")
    _, writer = await asyncio.open_connection(host.strip("[]"), int(port), ssl=context)
    try:
        shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    finally:
        writer.transport.abort()
    # Imported by who joins: most agents start without.
    from cryptography import x509

    try:
        extensions = x509.load_der_x509_certificate(shown).extensions
        found = extensions.get_extension_for_oid(x509.ObjectIdentifier(_CA_EXTENSION)).value
        assert isinstance(found, x509.UnrecognizedExtension)
        der = found.value
    except (ValueError, TypeError, x509.ExtensionNotFound):
        raise IdentityError(f"{server}: that is no Fleet Commander server with TLS: look at the address") from None
    if hashlib.sha256(der).hexdigest() != sha256:
        raise IdentityError(
            f"{server}: another server answers there than the one that made the token: its authority is not the same"
        )
    return ssl.DER_cert_to_PEM_cert(der)
