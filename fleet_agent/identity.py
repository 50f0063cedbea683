"""Who this agent is to its server: nobody in particular, the bearer of a key, or the node its certificate names."""

from __future__ import annotations

import base64
import datetime as dt
import json
import os
import secrets
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import grpc

SERVER_NAME = "server.fleet.internal"
"""The name in the server's certificate, whatever address is dialled."""
Options = list[tuple[str, int | str]]


class IdentityError(RuntimeError):
    """The identity cannot be used; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What `fleet agent --join` keeps: key, certificate and the server's authority, all PEM."""

    node_id: str
    server: str
    """Address of the door for all; where a certificate is asked for at first."""
    agents_server: str
    """Address of the door for agents with certificates."""
    key: str
    certificate: str
    authority: str

    @classmethod
    def load(cls, folder: Path) -> Identity | None:
        """The identity in the state folder, None where there is none. Blocks. Raises IdentityError."""
        path = folder / "identity.json"
        try:
            if path.stat().st_mode & 0o077:
                raise IdentityError(f"{path}: others may read it: chmod 600 {path}")
            return cls(**json.loads(path.read_text()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise IdentityError(f"{path}: {error}: remove it and join again with a token") from error

    def save(self, folder: Path) -> None:
        """Writes it whole or not at all, for its owner alone. Blocks. Raises OSError."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        fresh = folder / f".identity.{secrets.token_hex(4)}"
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(fd, "w") as stream:
                json.dump(asdict(self), stream)
                stream.flush()
                os.fsync(stream.fileno())
            fresh.replace(folder / "identity.json")
        except BaseException:
            fresh.unlink(missing_ok=True)
            raise

    def renewed(self, key: str, certificate: str) -> Identity:
        """The same node with a fresh certificate."""
        return replace(self, key=key, certificate=certificate)

    @property
    def span(self) -> tuple[dt.datetime, dt.datetime]:
        """From when and until when the certificate is good. Raises IdentityError."""
        # Imported by who has a certificate, or asks for one: most agents start without.
        from cryptography import x509

        try:
            read = x509.load_pem_x509_certificate(self.certificate.encode())
        except ValueError as error:
            raise IdentityError("identity.json: its certificate is spoiled: join again with a token") from error
        return read.not_valid_before_utc, read.not_valid_after_utc


def key_and_request() -> tuple[str, bytes]:
    """A fresh private key, which stays here, and a request for its certificate; both PEM."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "agent")])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return pem.decode(), request.public_bytes(serialization.Encoding.PEM)


class Door:
    """Makes channels to the server: plain, over TLS, or with the node's certificate; always by the newest identity."""

    def __init__(self, server: str, *, authority: bytes | None = None, identity: Identity | None = None) -> None:
        self._server = server
        self._authority = authority
        self.identity = identity

    @property
    def address(self) -> str:
        """What is dialled."""
        return self._server if self.identity is None else self.identity.agents_server

    def channel(self, options: Options) -> grpc.aio.Channel:
        """A channel that connects at the first call."""
        identity = self.identity
        if identity is not None:
            credentials = grpc.ssl_channel_credentials(
                identity.authority.encode(), identity.key.encode(), identity.certificate.encode()
            )
        elif self._authority is not None:
            credentials = grpc.ssl_channel_credentials(self._authority)
        else:
            return grpc.aio.insecure_channel(self.address, options=options)
        named: Options = [*options, ("grpc.ssl_target_name_override", SERVER_NAME)]
        return grpc.aio.secure_channel(self.address, credentials, options=named)


@dataclass(frozen=True, slots=True)
class Token:
    """What a join token says."""

    secret: str
    authority_sha256: str
    servers: tuple[str, ...]

    @classmethod
    def read(cls, text: str) -> Token:
        """Raises IdentityError for what is no token."""
        prefix, _, body = text.strip().partition(".")
        try:
            if prefix != "fjt1":
                raise ValueError
            content = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
            return cls(str(content["k"]), str(content["c"]), tuple(str(one) for one in content["s"]))
        except (ValueError, KeyError, TypeError):
            raise IdentityError("--join: that is no join token: make one with `fleet nodes token`") from None
