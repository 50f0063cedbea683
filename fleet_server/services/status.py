"""How the fleet is and what it can do; whether the server accepts work."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fleet.v1 import fleet_pb2, queue_pb2, types_pb2

from fleet_server.domain.errors import FleetError
from fleet_server.domain.job import JobState, Lane, Priority
from fleet_server.domain.node import NodeStatus
from fleet_server.services.estimates import Estimates
from fleet_server.services.models import ModelCatalog
from fleet_server.services.pauses import message_of
from fleet_server.services.ports import Nodes
from fleet_server.services.rates import Rates
from fleet_server.services.words import JOB_TYPES, priority_number, type_number, type_word
from fleet_server.store import Durability, LaneView, Store

CAPABILITIES = ("nodes", "containers", "images", "generation", "ssh", "metrics", "vision")
CONNECTED = "Successfully connected to Fleet Commander"


@dataclass(frozen=True, slots=True)
class StatusSettings:
    """What the server is. `check_seconds` is how long a reading of the store's durability holds."""

    version: str
    mode: str = "embedded"
    body_bytes: int = 1 << 20
    batch_jobs: int = 1_000
    queued_jobs: int = 1_000_000
    input_bytes: int = 512 << 20
    check_seconds: float = 10.0
    store_seconds: float = 2.0


class StatusBoard:
    """Answers about the whole. `refusal` says why the server takes no work now, None if it does (disk, shutdown)."""

    def __init__(
        self,
        store: Store,
        nodes: Nodes,
        catalog: ModelCatalog,
        rates: Rates,
        settings: StatusSettings,
        estimates: Estimates,
        *,
        clock: Callable[[], int],
        refusal: Callable[[], FleetError | None] = lambda: None,
        notices: Callable[[], Sequence[str]] = lambda: (),
        s3: Callable[[], tuple[str, str | None]] = lambda: ("off", None),
    ) -> None:
        self._store = store
        self._nodes = nodes
        self._catalog = catalog
        self._rates = rates
        self._estimates = estimates
        self.settings = settings
        self._clock = clock
        self._refusal = refusal
        self._notices = notices
        self._s3 = s3
        self._started = time.monotonic()
        self._checked: tuple[float, Durability] | None = None

    async def check_health(self) -> None:
        """Returns if the server accepts work. Raises STORE_UNAVAILABLE, QUEUE_FULL, or what `refusal` says."""
        refusal = self._refusal()
        if refusal is not None:
            raise refusal
        try:
            async with asyncio.timeout(self.settings.store_seconds):
                await self._store.ping()
                used, limit = await self._store.memory()
        except TimeoutError:
            raise FleetError("STORE_UNAVAILABLE", "the store does not answer in time") from None
        if limit and used > limit * 0.8:
            raise FleetError("QUEUE_FULL", "the store's memory is full to 80 %: jobs are refused until some have ended")

    async def status(self) -> fleet_pb2.GetStatusResponse:
        """How the fleet is. Answers with the store away too."""
        s3, why = self._s3()
        reply = fleet_pb2.GetStatusResponse(
            version=self.settings.version,
            mode=self.settings.mode,
            uptime_seconds=int(time.monotonic() - self._started),
            durability="best-effort",
            nodes=self._count_nodes(),
            jobs=queue_pb2.JobCounts(),
            store=fleet_pb2.PartStatus(status="ok"),
            s3=fleet_pb2.PartStatus(status=s3, detail=why),
            notices=[*self._catalog.alias_notes(), *self._notices()],
        )
        trouble = await self._fill_store(reply)
        if not reply.nodes.online:
            reply.notices.append("no node is online: jobs wait; start an agent")
        refusal = self._refusal()
        if refusal is not None:
            reply.notices.append(refusal.detail)
        if trouble is not None or refusal is not None:
            reply.status = "unavailable"
        else:
            well = reply.nodes.online and reply.durability == "fsync" and s3 != "unavailable"
            reply.status = "ok" if well else "degraded"
        return reply

    async def _fill_store(self, reply: fleet_pb2.GetStatusResponse) -> FleetError | None:
        try:
            async with asyncio.timeout(self.settings.store_seconds):
                durability = await self._durability()
                reply.jobs.CopyFrom(job_counts(await self._store.jobs.counts()))
        except (FleetError, TimeoutError) as error:
            detail = error.detail if isinstance(error, FleetError) else "the store does not answer in time"
            reply.store.CopyFrom(fleet_pb2.PartStatus(status="unavailable", detail=detail))
            return FleetError("STORE_UNAVAILABLE", detail)
        reply.durability = durability.mode
        if durability.mode != "fsync":
            reply.notices.append(f"durability is {durability.mode}: {durability.detail}")
        return None

    async def _durability(self) -> Durability:
        now = time.monotonic()
        if self._checked is None or now - self._checked[0] > self.settings.check_seconds:
            self._checked = (now, await self._store.check())
        return self._checked[1]

    def _count_nodes(self) -> fleet_pb2.NodeCounts:
        statuses = Counter(node.status for node in self._nodes.nodes())
        return fleet_pb2.NodeCounts(
            total=statuses.total(),
            online=statuses[NodeStatus.ONLINE],
            disconnected=statuses[NodeStatus.DISCONNECTED],
            down=statuses[NodeStatus.DOWN],
        )

    def capabilities(self) -> fleet_pb2.GetCapabilitiesResponse:
        """What the fleet can do now."""
        online = self._nodes.online()
        settings = self.settings
        return fleet_pb2.GetCapabilitiesResponse(
            version=settings.version,
            capabilities=CAPABILITIES,
            priorities=[priority_number(priority) for priority in Priority],
            job_types=[
                fleet_pb2.JobTypeCapability(
                    job_type=number, online_nodes=sum(type_word(number) in node.job_types for node in online)
                )
                for number in JOB_TYPES
            ],
            clusters=sorted({cluster for node in self._nodes.nodes() for cluster in node.clusters}),
            engines=sorted({engine for node in online for engine in node.engines}),
            default_model=self._catalog.default_model(),
            limits=fleet_pb2.Limits(
                body_bytes=settings.body_bytes,
                batch_jobs=settings.batch_jobs,
                queued_jobs=settings.queued_jobs,
                input_bytes=settings.input_bytes,
            ),
        )

    async def queue_stats(self) -> queue_pb2.GetStatsResponse:
        """Depths, rates and waits of the queue."""
        counts, waiting, lanes, pauses = await asyncio.gather(
            self._store.jobs.counts(),
            self._store.jobs.waiting_by_priority(),
            self._store.jobs.lanes(idle=True),
            self._store.pauses.list(),
        )
        reply = queue_pb2.GetStatsResponse(
            jobs=job_counts(counts),
            queued_by_priority=queue_pb2.PriorityCounts(
                high=waiting.get(Priority.HIGH, 0),
                normal=waiting.get(Priority.NORMAL, 0),
                low=waiting.get(Priority.LOW, 0),
            ),
            pauses=[message_of(pause) for pause in pauses],
        )
        self._rates.fill(reply)
        now = self._clock()
        etas: list[tuple[Lane, float | None]] = []
        for view in lanes:
            if view.waiting or view.running:
                # What is held back ends nobody knows when.
                eta = None if view.paused else self._estimates.lane(view.lane, view.waiting + view.running)
                etas.append((view.lane, eta))
                reply.lanes.append(self._lane(view, now, eta))
        reply.lanes.sort(key=lambda lane: (lane.target_cluster, lane.job_type, lane.target_model, list(lane.loras)))
        whole = self._estimates.queue(etas) if etas else None
        if whole is not None:
            reply.eta_seconds = round(whole, 3)
        return reply

    def _lane(self, view: LaneView, now: int, eta: float | None) -> queue_pb2.LaneStats:
        lane = view.lane
        stats = queue_pb2.LaneStats(
            target_cluster=lane.cluster,
            # A mixed lane holds jobs of many types; the contract has no word for that but the freest one.
            job_type=type_number(lane.job_type) or types_pb2.JOB_TYPE_CUSTOM,
            target_model=lane.model or None,
            loras=lane.loras,
            queued=view.waiting,
            running=view.running,
            paused=view.paused,
        )
        if view.oldest_enqueued_ms is not None:
            stats.oldest_queued_seconds = max(0, now - view.oldest_enqueued_ms) / 1000
        if eta is not None:
            stats.eta_seconds = round(eta, 3)
        return stats


def job_counts(counts: dict[JobState, int]) -> queue_pb2.JobCounts:
    """Jobs by state as the API has them."""
    return queue_pb2.JobCounts(**{state.value: counts.get(state, 0) for state in JobState})
