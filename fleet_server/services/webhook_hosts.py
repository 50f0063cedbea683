"""How many requests each receiver gets at once, so that one that is dead or slow never holds up the others. No I/O."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")

_WAITING_ROUNDS = 2
_SILENT = 3
_KEPT = 4_096


@dataclass(frozen=True, slots=True)
class HostLimits:
    """At most `total` requests at once and `per_host` to one receiver; one that left three in a row without an answer
    gets one at a time until it answers, and all such receivers together get half of `total`. What has no room is put
    off for at most `defer_seconds`.
    """

    total: int = 64
    per_host: int = 8
    defer_seconds: float = 300.0
    first_guess_seconds: float = 0.05


@dataclass(slots=True)
class _Host(Generic[T]):
    seconds: float
    """How long a request takes, lately."""
    active: int = 0
    silent: int = 0
    next_free: float = 0.0
    waiting: deque[T] = field(default_factory=deque)


class Hosts(Generic[T]):
    """Admits what is to be sent, by receiver. Times are seconds of any steady clock."""

    def __init__(self, limits: HostLimits) -> None:
        self._limits = limits
        self._hosts: dict[str, _Host[T]] = {}
        self._in_line: dict[str, None] = {}
        self._silent: set[str] = set()
        self._active = 0
        self._waiting = 0

    @property
    def room(self) -> int:
        """How many more may be offered now; the places that one receiver can take are few of them."""
        return max(0, 3 * self._limits.total - self._active - self._waiting)

    @property
    def active(self) -> int:
        """Requests under way."""
        return self._active

    def offer(self, host: str, item: T, now: float) -> float | None:
        """Takes an item: it comes from `next` at its turn (None). Or says in how many seconds to offer it again."""
        known = self._hosts.get(host)
        if known is None:
            known = self._hosts[host] = _Host(seconds=self._limits.first_guess_seconds)
        if len(known.waiting) < _WAITING_ROUNDS * self._limit(known) and not self._crowded_by_silent(host):
            known.waiting.append(item)
            self._in_line[host] = None
            self._waiting += 1
            return None
        # Those that are put off come back one after the other, as fast as the receiver has been answering.
        known.next_free = max(known.next_free, now) + known.seconds / self._limit(known)
        return min(known.next_free - now, self._limits.defer_seconds)

    def next(self) -> tuple[str, T] | None:
        """The next item to send now, with its host; `finished` is to be called for it."""
        host = self._first()
        if host is None:
            return None
        known = self._hosts[host]
        known.active += 1
        self._active += 1
        return host, self._pop(host, known)

    @property
    def startable(self) -> bool:
        """Whether `next` would give something."""
        return self._first() is not None

    def _first(self) -> str | None:
        if self._active >= self._limits.total:
            return None
        half = sum(self._hosts[host].active for host in self._silent) >= self._limits.total / 2
        for host in self._in_line:
            known = self._hosts[host]
            if known.active < self._limit(known) and not (half and host in self._silent):
                return host
        return None

    def _crowded_by_silent(self, host: str) -> bool:
        """Whether this one is silent, and so many wait for such receivers that others might find no room."""
        if host not in self._silent:
            return False
        return sum(len(self._hosts[silent].waiting) for silent in self._silent) >= self._limits.total

    def _pop(self, host: str, known: _Host[T]) -> T:
        """The first that waits for this host, which is last in turn from now on."""
        item = known.waiting.popleft()
        self._waiting -= 1
        del self._in_line[host]
        if known.waiting:
            self._in_line[host] = None
        return item

    def drain(self) -> list[T]:
        """Takes out all that waits."""
        items = []
        while self._in_line:
            host = next(iter(self._in_line))
            items.append(self._pop(host, self._hosts[host]))
        return items

    def finished(self, host: str, *, answered: bool, seconds: float) -> None:
        """One request is over; whether an answer of any kind came."""
        known = self._hosts[host]
        known.active -= 1
        self._active -= 1
        known.seconds += (seconds - known.seconds) / 4
        known.silent = 0 if answered else known.silent + 1
        if answered:
            known.next_free = 0.0
            self._silent.discard(host)
        elif known.silent >= _SILENT:
            self._silent.add(host)
        if len(self._hosts) > _KEPT:
            self._forget_idle()

    def skipped(self, host: str) -> None:
        """What `next` gave was not sent after all."""
        self._hosts[host].active -= 1
        self._active -= 1

    def _limit(self, known: _Host[T]) -> int:
        return 1 if known.silent >= _SILENT else self._limits.per_host

    def _forget_idle(self) -> None:
        for host in [name for name, known in self._hosts.items() if not known.active and not known.waiting]:
            del self._hosts[host]
            self._silent.discard(host)
