"""The fleet's own certificate authority: it vouches for this server and for the nodes that joined.

Everything lies in one folder, keys readable by their owner alone. Replicas share a fleet's authority by sharing ca.pem
and ca.key; their own certificates they make themselves.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import os
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

SERVER_NAME = "server.fleet.internal"
"""The name by which agents know the server, whatever address they dial."""
CA_EXTENSION = x509.ObjectIdentifier("2.25.306420977236119428226893214926419053217")
"""Extension of the server's certificate with the authority's own, so that who knows only its hash can find it."""
IDENTITY_PREFIX = "fleet:node:"
CA_DAYS, SERVER_DAYS = 3650, 365
_SKEW = dt.timedelta(minutes=10)
"""Clocks of nodes may be behind."""


class AuthorityError(RuntimeError):
    """The folder's files cannot be used; the text says which and what to do."""


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate, PEM, and its end."""

    pem: bytes
    expires: dt.datetime


@dataclass(frozen=True, slots=True)
class Pair:
    """A private key and its certificate chain, PEM."""

    key: bytes
    chain: bytes
    expires: dt.datetime


class Authority:
    """Opened from its folder, made there at the first need. Signing takes well under a millisecond."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate, *, node_days: float) -> None:
        self._key = key
        self._certificate = certificate
        self._node_days = node_days
        self.pem = certificate.public_bytes(serialization.Encoding.PEM)
        self.sha256 = certificate.fingerprint(hashes.SHA256()).hex()

    @classmethod
    def open(cls, folder: Path, *, node_days: float = 30) -> Authority:
        """The authority of the folder. Blocks. Raises AuthorityError."""
        key_file, file = folder / "ca.key", folder / "ca.pem"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not key_file.exists() and not file.exists():
                key, certificate = _made()
                write_secret(file, certificate.public_bytes(serialization.Encoding.PEM))
                write_secret(key_file, _pem_of(key))
            if key_file.stat().st_mode & 0o077:
                raise AuthorityError(f"{key_file}: others may read it: chmod 600 {key_file}")
            loaded = serialization.load_pem_private_key(key_file.read_bytes(), None)
            certificate = x509.load_pem_x509_certificate(file.read_bytes())
        except OSError as error:
            raise AuthorityError(f"{error.filename}: {error.strerror}: ca.key and ca.pem belong together") from error
        except (ValueError, TypeError) as error:
            raise AuthorityError(f"{folder}: ca.key or ca.pem is no PEM file without a passphrase: {error}") from error
        if not isinstance(loaded, ec.EllipticCurvePrivateKey) or loaded.public_key() != certificate.public_key():
            raise AuthorityError(f"{folder}: ca.key is not the key of ca.pem: put the right one there")
        if certificate.not_valid_after_utc <= _now():
            raise AuthorityError(f"{file}: the certificate has expired: remove ca.pem and ca.key, and join all nodes")
        return cls(loaded, certificate, node_days=node_days)

    def for_server(self, names: Iterable[str]) -> Pair:
        """A key and a certificate for this server under these names and addresses."""
        key = ec.generate_private_key(ec.SECP256R1())
        general: dict[x509.GeneralName, None] = {x509.DNSName(SERVER_NAME): None}
        for name in names:
            try:
                general[x509.IPAddress(ipaddress.ip_address(name))] = None
            except ValueError:
                if name.isascii() and 0 < len(name) < 254:
                    general[x509.DNSName(name)] = None
        der = self._certificate.public_bytes(serialization.Encoding.DER)
        builder = (
            self._begun(key.public_key(), "Fleet Commander server", SERVER_DAYS)
            .add_extension(x509.SubjectAlternativeName(list(general)), critical=False)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=True)
            .add_extension(x509.UnrecognizedExtension(CA_EXTENSION, der), critical=False)
        )
        issued = self._signed(builder)
        return Pair(_pem_of(key), issued.pem + self.pem, issued.expires)

    def for_node(self, node_id: str, identity: str, request: bytes) -> Issued:
        """A certificate for a node's own key. Raises ValueError for what is no request signed by its key.

        Only the key is taken from the request: the names are ours.
        """
        key, _ = read_request(request)
        names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"{IDENTITY_PREFIX}{identity}")])
        builder = (
            self._begun(key, node_id, self._node_days)
            .add_extension(names, critical=False)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=True)
        )
        return self._signed(builder)

    def _begun(self, key: ec.EllipticCurvePublicKey, name: str, days: float) -> x509.CertificateBuilder:
        now = _now()
        return (
            x509.CertificateBuilder()
            .subject_name(_name(name))
            .issuer_name(self._certificate.subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _SKEW)
            .not_valid_after(min(now + dt.timedelta(days=days), self._certificate.not_valid_after_utc))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )

    def _signed(self, builder: x509.CertificateBuilder) -> Issued:
        made = builder.sign(self._key, hashes.SHA256())
        return Issued(made.public_bytes(serialization.Encoding.PEM), made.not_valid_after_utc)


def read_request(request: bytes) -> tuple[ec.EllipticCurvePublicKey, str]:
    """The key of a certificate request, and its fingerprint. Raises ValueError."""
    read = x509.load_pem_x509_csr(request)
    try:
        sound = read.is_signature_valid
    except InvalidSignature:
        sound = False
    key = read.public_key()
    if not sound or not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ValueError("must be signed by its own P-256 key")
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    digest = hashes.Hash(hashes.SHA256())
    digest.update(der)
    return key, digest.finalize().hex()


def write_secret(path: Path, data: bytes) -> None:
    """Writes a file that its owner alone may read, whole or not at all, on the disk when this returns."""
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def _made() -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name(f"Fleet Commander CA {secrets.token_hex(4)}")
    now = _now()
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + dt.timedelta(days=CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return key, certificate


def _pem_of(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)
