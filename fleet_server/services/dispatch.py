"""Gives waiting jobs to free slots: one loop a replica, woken by submits and by freed slots."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import structlog
from fleet.v1.types_pb2 import JobSpec

from fleet_server.domain.errors import FleetError
from fleet_server.domain.job import Claim, Lane
from fleet_server.domain.node import NodeView
from fleet_server.domain.placement import Demand, share_out
from fleet_server.services.fleet import FleetView
from fleet_server.services.lanes import lane_of
from fleet_server.services.nodes import now_ms
from fleet_server.services.sessions import Sessions
from fleet_server.store import ClaimRequest, LaneView, Store

_log = structlog.get_logger("fleet.dispatch")


@dataclass(frozen=True, slots=True)
class DispatchSettings:
    """`poll_seconds`: a round comes at least so often while slots are free (other replicas' submits, due jobs)."""

    poll_seconds: float = 1.0
    repeat_seconds: float = 0.5
    mixed_jobs: int = 32
    """How many jobs of a cluster's overflow lane are looked at in a round."""


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What may be claimed: a whole lane, or one job of a mixed lane (`job_id`), which then is its own demand."""

    lane: Lane
    waiting: int
    head_effective_ms: int | None
    source: str
    job_id: str = ""


class Dispatcher:
    """Fills the free slots of the nodes whose streams this replica holds.

    `wake()` is cheap and may be called from anywhere in the loop's thread; `run()` is one task. Each claim is for one
    free slot, so a node never has more on its way than it can run; what cannot be sent is given back at once.
    """

    def __init__(
        self,
        store: Store,
        fleet: FleetView,
        sessions: Sessions,
        *,
        settings: DispatchSettings | None = None,
        clock: Callable[[], int] = now_ms,
    ) -> None:
        self._store = store
        self._fleet = fleet
        self._sessions = sessions
        self._settings = settings or DispatchSettings()
        self._clock = clock
        self._some = asyncio.Event()
        self._unsettled: list[ClaimRequest] = []
        fleet.subscribe_changes(lambda _: self.wake())

    def wake(self) -> None:
        """Something changed: jobs wait or slots are free. Never waits; many wakes are one round."""
        self._some.set()

    async def run(self) -> None:
        """Rounds until cancelled."""
        while True:
            self._some.clear()
            try:
                while await self.round():
                    pass
            except FleetError as error:
                _log.warning("dispatch waits", reason=error.reason, detail=error.detail)
                await asyncio.sleep(self._settings.repeat_seconds)
                continue
            try:
                async with asyncio.timeout(self._settings.poll_seconds):
                    await self._some.wait()
            except TimeoutError:
                continue

    async def round(self) -> int:
        """One look at lanes and slots, one batch of claims; how many jobs were sent out. Raises STORE_UNAVAILABLE."""
        if self._unsettled:
            # The outcome of these is unknown: the same tokens again.
            return await self._claim(self._unsettled)
        nodes = self._open_nodes()
        if not nodes:
            return 0
        wanted = await self._wanted()
        if not wanted:
            return 0
        requests = [self._request(node, one) for node, one in self._choose(nodes, wanted)]
        return await self._claim(requests) if requests else 0

    def _open_nodes(self) -> list[NodeView]:
        return [
            replace(node, slots_free=free)
            for node in self._fleet.online()
            if (free := self._sessions.slots_free(node.node_id)) > 0
        ]

    async def _wanted(self) -> list[_Wanted]:
        wanted: list[_Wanted] = []
        for view in await self._store.jobs.lanes():
            if view.mixed:
                wanted.extend(await self._mixed(view))
            else:
                lane = view.lane
                wanted.append(_Wanted(lane, view.waiting, view.head_effective_ms, lane.lane_id))
        return wanted

    async def _mixed(self, view: LaneView) -> list[_Wanted]:
        """The next jobs of an overflow lane, each with what it needs."""
        wanted = []
        for record in await self._store.jobs.peek(view.lane.lane_id, self._settings.mixed_jobs):
            # Its own id: avoidance and counting are by job here.
            lane = replace(lane_of(JobSpec.FromString(record.spec)), lane_id=record.job_id)
            wanted.append(_Wanted(lane, 1, record.enqueued_ms, view.lane.lane_id, record.job_id))
        return wanted

    def _choose(self, nodes: list[NodeView], wanted: list[_Wanted]) -> list[tuple[NodeView, _Wanted]]:
        by_node = {node.node_id: node for node in nodes}
        by_lane = {one.lane.lane_id: one for one in wanted}
        avoided = self._fleet.avoided()
        demands: Sequence[Demand] = wanted
        pairs = share_out(nodes, demands, self._clock(), avoided=avoided)
        return [(by_node[node_id], by_lane[lane_id]) for node_id, lane_id in pairs]

    def _request(self, node: NodeView, wanted: _Wanted) -> ClaimRequest:
        return ClaimRequest(
            lane_id=wanted.source,
            node_id=node.node_id,
            session=node.session,
            token=secrets.token_hex(16),
            lease_ms=self._sessions.settings.lease_ms,
            job_id=wanted.job_id,
        )

    async def _claim(self, requests: list[ClaimRequest]) -> int:
        self._unsettled = requests
        claims = await self._store.jobs.claim(requests)
        self._unsettled = []
        sent = 0
        for claim in claims:
            if claim is not None:
                sent += await self._send(claim)
        return sent

    async def _send(self, claim: Claim) -> bool:
        if self._sessions.assign(claim):
            return True
        await self._store.jobs.release(claim.job.job_id, claim.token)
        return False
