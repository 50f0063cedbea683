"""Signatures of callbacks by Standard Webhooks (v1, HMAC-SHA256), and which secrets sign for which receiver. Pure."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import SplitResult, urlsplit

PREFIX = "whsec_"
LEAST_BYTES = 24
MOST_BYTES = 64
_PORTS = {"http": 80, "https": 443}


class SecretError(ValueError):
    """A secret, or a line of a secrets file, cannot be used; the text never holds the secret itself."""


@dataclass(frozen=True, slots=True)
class Secret:
    """One signing key."""

    key: bytes = field(repr=False)

    @classmethod
    def parse(cls, text: str) -> Secret:
        """The secret of `whsec_<base64>`. Raises SecretError."""
        if not text.startswith(PREFIX):
            raise SecretError(f"a secret must begin with {PREFIX}; make one of 32 random bytes in base64")
        try:
            key = base64.b64decode(text.removeprefix(PREFIX), validate=True)
        except (binascii.Error, ValueError):
            raise SecretError(f"what follows {PREFIX} must be base64 with its padding") from None
        if not LEAST_BYTES <= len(key) <= MOST_BYTES:
            raise SecretError(f"a secret must be {LEAST_BYTES} to {MOST_BYTES} bytes long; this one has {len(key)}")
        return cls(key)

    @property
    def text(self) -> str:
        """As receivers are given it."""
        return PREFIX + base64.b64encode(self.key).decode()

    def sign(self, webhook_id: str, timestamp: int, body: bytes) -> str:
        """The v1 signature of one message sent at `timestamp` (Unix seconds)."""
        signed = f"{webhook_id}.{timestamp}.".encode() + body
        return "v1," + base64.b64encode(hmac.digest(self.key, signed, hashlib.sha256)).decode()


Secrets = tuple[Secret, ...]


def parse_secrets(text: str) -> Secrets:
    """One or more secrets, separated by spaces: all of them sign, so that receivers can change from one to another.

    Raises SecretError.
    """
    words = text.split()
    if not words:
        raise SecretError("a secret is missing")
    return tuple(Secret.parse(word) for word in words)


def signature_header(secrets: Sequence[Secret], webhook_id: str, timestamp: int, body: bytes) -> str:
    """The value of webhook-signature."""
    return " ".join(secret.sign(webhook_id, timestamp, body) for secret in secrets)


def _origin(parts: SplitResult) -> tuple[str, str, int]:
    host = (parts.hostname or "").removesuffix(".")
    return parts.scheme, host, parts.port or _PORTS[parts.scheme]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Receivers below one address, and their secrets."""

    origin: tuple[str, str, int]
    path: str
    secrets: Secrets

    @classmethod
    def parse(cls, line: str) -> Endpoint:
        """`<http(s) address without query> whsec_... [whsec_...]`. Raises SecretError."""
        address, _, rest = line.partition(" ")
        try:
            parts = urlsplit(address)
            usable = parts.scheme in _PORTS and parts.hostname and "@" not in parts.netloc
            usable = usable and not parts.query and not parts.fragment
            origin = _origin(parts) if usable else None
        except ValueError:
            origin = None
        if origin is None:
            raise SecretError("a line begins with a http or https address without user name and query")
        return cls(origin, parts.path.rstrip("/"), parse_secrets(rest))

    def covers(self, parts: SplitResult) -> bool:
        """Whether an address lies at or below this one."""
        return _origin(parts) == self.origin and f"{parts.path}/".startswith(f"{self.path}/")


@dataclass(frozen=True, slots=True)
class SecretBook:
    """The secrets of each receiver: those of the longest address that covers it, else the default ones."""

    default: Secrets
    endpoints: tuple[Endpoint, ...] = ()

    def for_url(self, url: str) -> Secrets:
        """The secrets that sign for this address."""
        parts = urlsplit(url)
        best = max((end for end in self.endpoints if end.covers(parts)), key=lambda end: len(end.path), default=None)
        return self.default if best is None else best.secrets


def parse_endpoints(text: str) -> tuple[Endpoint, ...]:
    """The lines of a secrets file; blank ones and those that begin with # are passed over. Raises SecretError."""
    found: list[Endpoint] = []
    for number, line in enumerate(text.splitlines(), 1):
        content = line.strip()
        if not content or content.startswith("#"):
            continue
        try:
            endpoint = Endpoint.parse(" ".join(content.split()))
        except SecretError as error:
            raise SecretError(f"line {number}: {error}") from None
        if any((endpoint.origin, endpoint.path) == (known.origin, known.path) for known in found):
            raise SecretError(f"line {number}: this address stands above already; give its secrets on one line")
        found.append(endpoint)
    return tuple(found)
