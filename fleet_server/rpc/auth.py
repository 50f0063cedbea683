"""API keys: who may call. Keys are kept hashed and compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from fleet_server.domain.errors import FleetError

V = TypeVar("V")

FAILURES_A_MINUTE = 10
_REMEMBERED_PEERS = 10_000


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key by its owner's name and SHA-256 (256 bits of randomness make a slow hash needless).

    One that is no `admin` reads, submits, cancels and minds outputs.
    """

    name: str
    digest: bytes
    admin: bool = True

    @classmethod
    def of(cls, name: str, key: str, *, admin: bool = True) -> ApiKey:
        return cls(name, hashlib.sha256(key.encode()).digest(), admin)


def key_in(metadata: Mapping[str, str]) -> str | None:
    """The key that a call brings, from X-API-Key or `Authorization: Bearer`."""
    key = metadata.get("x-api-key")
    if key is not None:
        return key
    scheme, _, token = metadata.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else None


class KeyRing:
    """The keys of this server; with none, every call is allowed and has no owner.

    A right key that came is remembered as it came until the keys change, so that it need not be hashed for each call.
    """

    def __init__(self, keys: Sequence[ApiKey], *, clock: Callable[[], float]) -> None:
        self._keys: tuple[ApiKey, ...] = ()
        self._open: dict[bytes, set[Callable[[], None]]] = {}
        self._admins: frozenset[str] = frozenset()
        self._brought: dict[str, str] = {}  # owners by right keys that have come
        self.replace(keys)
        self._clock = clock
        self._failures: OrderedDict[str, list[float]] = OrderedDict()
        self._welcome: OrderedDict[str, None] = OrderedDict()

    @property
    def required(self) -> bool:
        return bool(self._keys)

    def replace(self, keys: Sequence[ApiKey]) -> None:
        """From now on these are the keys. Who watches one that is gone, or is an admin's no more, is told."""
        withdrawn = set(self._keys) - set(keys)
        self._keys = tuple(keys)
        self._brought.clear()
        self._admins = frozenset(key.name for key in keys if key.admin)
        for known in withdrawn:
            for tell in tuple(self._open.get(known.digest, ())):
                tell()

    @contextmanager
    def watching(self, key: str | None, tell: Callable[[], None]) -> Iterator[None]:
        """Calls `tell` where the key is withdrawn meanwhile: for calls that last."""
        if key is None or not self._keys:
            yield
            return
        digest = hashlib.sha256(key.encode()).digest()
        watchers = self._open.setdefault(digest, set())
        watchers.add(tell)
        try:
            yield
        finally:
            watchers.discard(tell)
            if not watchers:
                self._open.pop(digest, None)

    def is_admin(self, owner: str) -> bool:
        """Whether the owner of a key may everything; without keys everybody may."""
        return not self._keys or owner in self._admins

    def owner(self, key: str | None, peer: str) -> str:
        """The owner's name, "" without keys.

        Raises API_KEY_MISSING, API_KEY_INVALID, or RATE_LIMITED after ten wrong keys of one address within a minute.
        An address that has brought a right key before is not locked out by somebody else's wrong ones there.
        """
        if not self._keys:
            return ""
        if key is None:
            raise FleetError("API_KEY_MISSING", "an API key is required: send it as X-API-Key or Authorization: Bearer")
        address = peer.rsplit(":", 1)[0]
        found = self._brought.get(key) or self._find(key)
        recent = self._recent(address) if self._failures else []
        if len(recent) >= FAILURES_A_MINUTE and not (found and address in self._welcome):
            raise FleetError(
                "RATE_LIMITED",
                "too many wrong API keys from this address: try again in a minute",
                retry_after_seconds=60,
            )
        if found:
            if address not in self._welcome:
                _remember(self._welcome, address, None)
            return found
        _remember(self._failures, address, [*recent, self._clock()])
        raise FleetError("API_KEY_INVALID", "the API key is not one of this server's: check FLEET_API_KEY")

    def _find(self, key: str) -> str:
        found = ""
        digest = hashlib.sha256(key.encode()).digest()
        for known in self._keys:
            if hmac.compare_digest(known.digest, digest):
                found = known.name
        if found:
            self._brought[key] = found
        return found

    def _recent(self, address: str) -> list[float]:
        now = self._clock()
        return [at for at in self._failures.get(address, ()) if now - at < 60]


def _remember(addresses: OrderedDict[str, V], address: str, value: V) -> None:
    """Keeps the newest addresses alone."""
    addresses[address] = value
    addresses.move_to_end(address)
    while len(addresses) > _REMEMBERED_PEERS:
        addresses.popitem(last=False)
