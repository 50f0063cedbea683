"""What time alone changes: leases that ran out, overdue runs, jobs whose time has come, records past their days."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import structlog

from fleet_server.domain.errors import FleetError
from fleet_server.domain.job import Lane
from fleet_server.domain.massloss import MassLossRule
from fleet_server.domain.node import NodeStatus, NodeView
from fleet_server.domain.placement import feasible
from fleet_server.services.completion import job_error
from fleet_server.services.fleet import FleetView
from fleet_server.store import ReapErrors, ReapWatch, Store

_log = structlog.get_logger("fleet.reaper")

ERRORS = ReapErrors(
    lost=job_error("NODE_LOST", "the node that ran the job was lost").SerializeToString(),
    poison=job_error("POISON", "nodes were lost again and again while they ran the job").SerializeToString(),
    timeout=job_error("TIMEOUT", "the run took longer than timeout_seconds").SerializeToString(),
    ttl=job_error("QUEUE_TTL_EXPIRED", "no node started the job within queue_ttl_seconds").SerializeToString(),
)


@dataclass(frozen=True, slots=True)
class ReaperSettings:
    """For `grace_seconds` after a start, or after the store was away, leases and overdue runs are left alone.

    For as long those of a node are whose replica is gone.
    """

    grace_seconds: float = 60.0
    sweep_seconds: float = 1.0
    purge_seconds: float = 60.0
    check_seconds: float = 5.0
    """How often the store is asked whether it is still the same process."""
    margin_seconds: float = 10.0
    lease_seconds: float = 30.0
    mass_loss: MassLossRule = field(default_factory=MassLossRule)

    @property
    def life_seconds(self) -> float:
        """How long this replica is taken to live after each sweep: over well before the leases that it kept."""
        return max(self.lease_seconds / 3, 3 * self.sweep_seconds)


class Reaper:
    """One task a replica, which is named `replica`; sweeps of several replicas at once do no harm."""

    def __init__(
        self,
        store: Store,
        fleet: FleetView,
        wake: Callable[[], None],
        *,
        replica: str = "server",
        settings: ReaperSettings | None = None,
    ) -> None:
        self._store = store
        self._fleet = fleet
        self._wake = wake
        self._missing = 0
        self._settings = settings = settings or ReaperSettings()
        life_ms, grace_ms = int(settings.life_seconds * 1000), int(settings.grace_seconds * 1000)
        self._watch = ReapWatch(replica, secrets.token_hex(8), life_ms, grace_ms, settings.mass_loss)
        self._run_id = ""
        self._hold_until = 0.0
        self._check_at = 0.0
        self._purge_at = 0.0
        self._single: frozenset[str] = frozenset()

    async def run(self) -> None:
        """Sweeps until cancelled; while the store is away it waits."""
        while True:
            try:
                more = await self.sweep()
            except FleetError as error:
                _log.warning("reaper waits", detail=error.detail)
                # What ran out while nobody could renew it was not the agents' fault.
                self._hold_until = asyncio.get_running_loop().time() + self._settings.grace_seconds
                more = False
            if not more:
                await asyncio.sleep(self._settings.sweep_seconds)

    async def sweep(self) -> bool:
        """One bounded sweep; whether another should follow at once. Raises STORE_UNAVAILABLE."""
        now = asyncio.get_running_loop().time()
        await self._check(now)
        result = await self._store.jobs.reap(
            ERRORS,
            hold=now < self._hold_until,
            margin_ms=int(self._settings.margin_seconds * 1000),
            single_node_lanes=self._single,
            watch=self._watch,
        )
        self._note_mass_loss(result.missing)
        if result.extended:
            _log.warning("attempts are left to nodes whose replica is gone", jobs=result.extended)
        for record in (*result.requeued, *result.failed):
            _log.warning("attempt ended by the server", job_id=record.job_id, state=record.state.value)
        if result.requeued or result.promoted:
            self._wake()
        purged = await self._purge(now)
        return result.more or purged

    def notices(self) -> list[str]:
        """What an operator should know of it, in sentences."""
        if not self._missing:
            return []
        return [
            f"{self._missing} nodes vanished at once: their jobs are left to them for now; "
            "look at the network between them and the servers"
        ]

    def _note_mass_loss(self, missing: int) -> None:
        if missing and not self._missing:
            _log.error("mass loss: nothing is reassigned for now", nodes=missing)
        elif self._missing and not missing:
            _log.info("mass loss is over")
        self._missing = missing

    async def _check(self, now: float) -> None:
        if now < self._check_at:
            return
        self._check_at = now + self._settings.check_seconds
        run_id = (await self._store.check()).run_id
        if run_id != self._run_id:
            self._run_id = run_id
            self._hold_until = now + self._settings.grace_seconds
        self._single = await self._single_node_lanes()

    async def _single_node_lanes(self) -> frozenset[str]:
        """Lanes that one known node alone could run: there, losses on one node are enough to call a job poison."""
        nodes = [_as_online(node) for node in self._fleet.nodes()]
        lanes = [view.lane for view in await self._store.jobs.lanes(idle=True)]
        return frozenset(lane.lane_id for lane in lanes if _by_one_alone(nodes, lane))

    async def _purge(self, now: float) -> bool:
        if now < self._purge_at:
            return False
        if await self._store.jobs.purge() > 0:
            return True
        self._purge_at = now + self._settings.purge_seconds
        return False


def _by_one_alone(nodes: list[NodeView], lane: Lane) -> bool:
    able = (node for node in nodes if feasible(node, lane) is None)
    return next(able, None) is not None and next(able, None) is None


def _as_online(node: NodeView) -> NodeView:
    return replace(node, status=NodeStatus.ONLINE, cordoned=False, draining=False)
