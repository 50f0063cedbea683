"""What a sweep over leases takes in and hands out."""

from __future__ import annotations

from dataclasses import dataclass

from fleet_server.domain.job import JobRecord
from fleet_server.domain.massloss import MassLossRule
from fleet_server.store.client import Argument

Arguments = list[Argument]


@dataclass(frozen=True, slots=True)
class ReapErrors:
    """Encoded fleet.v1.JobError for what the store ends by itself: lost, poison, timeout (overdue), ttl (never
    started).
    """

    lost: bytes
    poison: bytes
    timeout: bytes
    ttl: bytes


@dataclass(frozen=True, slots=True)
class ReapWatch:
    """Who sweeps, and what it spares. `boot` differs at each start of `replica`, which is taken to live for `life_ms`.

    Attempts of nodes whose replica is gone are left to them, each once, until `grace_ms` after the end of its life sign
    or after its new start.
    """

    replica: str
    boot: str
    life_ms: int
    grace_ms: int
    mass_loss: MassLossRule

    def args(self) -> Arguments:
        """As reap.lua takes it."""
        rule = self.mass_loss
        args: Arguments = [self.replica, self.boot, self.life_ms, self.grace_ms, repr(rule.share), rule.least]
        return [*args, int(rule.window_seconds * 1000), int(rule.freeze_seconds * 1000)]


UNWATCHED = ReapWatch("", "", 0, 0, MassLossRule())
"""No life sign is given, and nothing is spared."""


@dataclass(frozen=True, slots=True)
class ReapResult:
    """The jobs that one sweep moved, as they are after it; `more` if a limit was met: sweep again at once.

    `missing` nodes vanished at once, so many that leases and overdue runs were left alone; 0: there is no mass loss.
    `extended` attempts were left to nodes whose replica is gone.
    """

    requeued: tuple[JobRecord, ...]
    failed: tuple[JobRecord, ...]
    promoted: tuple[JobRecord, ...]
    more: bool
    missing: int = 0
    extended: int = 0
