"""Gives waiting jobs to free slots: one loop a replica, woken by submits and by freed slots."""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import structlog
from fleet.v1.types_pb2 import JobSpec

from fleet_server.domain.errors import FleetError
from fleet_server.domain.job import BOOST_MS, Claim, Lane, NewJob, Priority
from fleet_server.domain.node import NodeView
from fleet_server.domain.placement import Feasibility, Placed, Plan, Situation, place
from fleet_server.domain.recorded import RecordedTiming
from fleet_server.services.fleet import FleetView
from fleet_server.services.flow import GATHER_SECONDS, Flow
from fleet_server.services.lanes import lane_of
from fleet_server.services.nodes import now_ms
from fleet_server.services.outlook import Outlook
from fleet_server.services.sessions import Sessions
from fleet_server.services.speeds import Speeds
from fleet_server.store import ClaimRequest, LaneView, Store

_log = structlog.get_logger("fleet.dispatch")
_SHOW_SECONDS = 0.1
"""Where rounds follow one another, what they leave is not looked at after each."""


@dataclass(frozen=True, slots=True)
class DispatchSettings:
    """`poll_seconds`: a round comes at least so often while slots are free (other replicas' submits, due jobs)."""

    poll_seconds: float = 1.0
    repeat_seconds: float = 0.5
    avoid_seconds: float = 1.0
    """How long a node is not asked again for a lane whose next jobs have just failed on it."""
    mixed_jobs: int = 32
    """How many jobs of a cluster's overflow lane are looked at in a round."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What may be claimed: a whole lane, or one job of a mixed lane (`job_id`), which then is its own demand."""

    lane: Lane
    waiting: int
    head_effective_ms: int | None
    head_priority: Priority | None
    oldest_enqueued_ms: int | None
    source: str
    job_id: str = ""
    head_owner_lag: float = 0.0
    paused: bool = False
    high_waiting: bool = False


@dataclass(frozen=True, slots=True)
class Decision:
    """One round for the record: `place(situation, timing=timing)` gives `plan` again, anywhere and at any time."""

    situation: Situation
    timing: RecordedTiming
    plan: Plan


class Watcher(Protocol):
    """Who looks at what waits, for reasons of its own."""

    @property
    def watching(self) -> bool:
        """Whether it wants to look at all now."""
        ...

    def consider(self, situation: Situation) -> None:
        """These lanes wait, and have got no slot just now."""
        ...


class Dispatcher:
    """Fills the free slots of the nodes whose streams this replica holds.

    `wake()` is cheap and may be called from anywhere in the loop's thread; `run()` is one task. Each claim is for one
    free slot, so a node never has more on its way than it can run; what cannot be sent is given back at once.
    `on_decision` hears of each round that placed or deferred anything, for logs and replays; `watcher` of what a round
    has left waiting, and every `poll_seconds` of what waits while all slots are taken. They must not wait.
    """

    def __init__(
        self,
        store: Store,
        fleet: FleetView,
        sessions: Sessions,
        *,
        speeds: Speeds | None = None,
        settings: DispatchSettings | None = None,
        clock: Callable[[], int] = now_ms,
        on_decision: Callable[[Decision], None] | None = None,
        watcher: Watcher | None = None,
    ) -> None:
        self._store = store
        self._fleet = fleet
        self._sessions = sessions
        self._speeds = speeds or Speeds(clock=clock)
        self._settings = settings or DispatchSettings()
        self._clock = clock
        self._on_decision = on_decision
        self._watcher = watcher
        self._shown = -math.inf
        self._verdicts = Feasibility()
        self._after_urgent: set[str] = set()
        self._look_again_ms: int | None = None
        self._some = asyncio.Event()
        self._flow = Flow()
        self._outlook = Outlook(self._settings.poll_seconds)
        self._known: dict[str, NodeView] = {}
        self._none_left = False
        self._unsettled: list[ClaimRequest] = []
        fleet.subscribe_changes(self._changed)

    def wake(self) -> None:
        """Something changed in the queue: look. Never waits; many wakes are one round."""
        self._outlook.doubt()
        self._some.set()

    def expect(self, jobs: Sequence[NewJob]) -> None:
        """These jobs were put in line, or are being so by calls that go to the store before any made after this."""
        now = self._clock()
        for job in jobs:
            self._outlook.expect(job, now)
        self._some.set()

    def rides(self) -> bool:
        """Whether the claim of a job that is submitted now should travel with its submit."""
        return not self._flow.busy and self._any_slot()

    def _any_slot(self) -> bool:
        return self._fleet.any_online(self._sessions.slots_free)

    def _changed(self, node_id: str) -> None:
        node, before = self._fleet.node(node_id), self._known.pop(node_id, None)
        if node is None:
            self._speeds.forget(node_id)
        else:
            self._known[node_id] = node
            if before is not None and _only_filled(before, node):
                # Nothing can be placed that could not before.
                return
        self._outlook.aged()
        self._some.set()

    async def run(self) -> None:
        """Rounds until cancelled."""
        while True:
            self._some.clear()
            try:
                while await self._gathered_round():
                    pass
            except FleetError as error:
                self._outlook.doubt()
                _log.warning("dispatch waits", reason=error.reason, detail=error.detail)
                await asyncio.sleep(self._settings.repeat_seconds)
                continue
            try:
                async with asyncio.timeout(self._patience()):
                    await self._some.wait()
            except TimeoutError:
                self._outlook.doubt()

    async def _gathered_round(self) -> int:
        """A round; where many jobs go out, slots that are freed within a few milliseconds are filled by one."""
        if self._flow.busy:
            await asyncio.sleep(GATHER_SECONDS)
        sent = await self.round()
        self._flow.note(sent)
        # Who submits more wakes us: without a word there is nothing left to look for.
        return 0 if self._none_left else sent

    def _patience(self) -> float:
        """Seconds until the next round comes by itself: at the latest when a deferral ends."""
        poll = self._settings.poll_seconds
        if self._look_again_ms is None:
            return poll
        return min(poll, max(0.0, (self._look_again_ms - self._clock()) / 1000))

    async def round(self) -> int:
        """One look at lanes and slots, one batch of claims; 0 if another round at once would find nothing new.

        Raises STORE_UNAVAILABLE.
        """
        self._look_again_ms = None
        self._none_left = False
        if self._unsettled:
            # The outcome of these is unknown: the same tokens again.
            return await self._claim(self._unsettled, sure=False)
        belief = self._outlook.take()
        if not self._any_slot():
            await self._show_all()
            return 0
        if belief is not None:
            requests = await self._requests(belief.lanes)
            if requests:
                return await self._claim(requests, sure=belief.sure)
            if belief.sure:
                return 0
        lanes = await self._store.jobs.lanes()
        self._outlook.looked(lanes)
        requests = await self._requests(lanes) if lanes else []
        return await self._claim(requests, sure=True) if requests else 0

    async def _requests(self, lanes: Sequence[LaneView]) -> list[ClaimRequest]:
        wanted = await self._wanted(lanes)
        if not wanted:
            return []
        plan = self._plan(wanted)
        self._show(wanted, plan)
        self._look_again_ms = plan.look_again_ms
        by_lane = {one.lane.lane_id: one for one in wanted}
        return [self._request(one, by_lane[one.lane_id]) for one in plan.placed]

    async def _show_all(self) -> None:
        """Shows what waits although there is no slot for it: it may need more than a slot."""
        if self._watcher is None or not self._watcher.watching:
            return
        if time.monotonic() - self._shown < self._settings.poll_seconds:
            return
        lanes = await self._store.jobs.lanes()
        self._show(await self._wanted(lanes), Plan())

    def _show(self, wanted: Sequence[Wanted], plan: Plan) -> None:
        now = time.monotonic()
        if self._watcher is None or not self._watcher.watching or now - self._shown < _SHOW_SECONDS:
            return
        self._shown = now
        placed = {one.lane_id for one in plan.placed}
        rest = [one for one in wanted if one.lane.lane_id not in placed]
        if rest:
            self._watcher.consider(self.situation(rest))

    def situation(self, wanted: Sequence[Wanted]) -> Situation:
        """What is known now; nodes with streams elsewhere are there, with no slot that this replica may fill."""
        nodes = [self._seen(node) for node in self._fleet.online()]
        return Situation(nodes, wanted, self._clock(), self._fleet.avoided(), frozenset(self._after_urgent))

    def nodes(self) -> list[NodeView]:
        """All nodes as rounds see them, those that are not online too."""
        return [self._seen(node) for node in self._fleet.nodes()]

    def _seen(self, node: NodeView) -> NodeView:
        return self._speeds.seen(node, self._fleet.running(node.node_id), self._sessions.slots_free(node.node_id))

    def _plan(self, wanted: Sequence[Wanted]) -> Plan:
        situation = self.situation(wanted)
        if self._on_decision is None:
            plan = place(situation, timing=self._speeds.book, verdicts=self._verdicts)
        else:
            timing = RecordedTiming.of(self._speeds.book)
            plan = place(situation, timing=timing, verdicts=self._verdicts)
            if plan.placed or plan.deferred:
                self._on_decision(Decision(situation, timing.sealed(), plan))
        for one in plan.placed:
            self._note_turn(one)
        return plan

    def _note_turn(self, placed: Placed) -> None:
        if placed.urgent:
            self._after_urgent.add(placed.node_id)
        else:
            self._after_urgent.discard(placed.node_id)

    async def _wanted(self, lanes: Sequence[LaneView]) -> list[Wanted]:
        wanted: list[Wanted] = []
        for view in lanes:
            if view.mixed:
                wanted.extend(await self._mixed(view))
            else:
                wanted.append(wanted_of(view))
        return wanted

    async def _mixed(self, view: LaneView) -> list[Wanted]:
        """The next jobs of an overflow lane, each with what it needs."""
        wanted = []
        for record in await self._store.jobs.peek(view.lane.lane_id, self._settings.mixed_jobs):
            # Its own id: avoidance and counting are by job here.
            lane = replace(lane_of(JobSpec.FromString(record.spec)), lane_id=record.job_id)
            effective = record.enqueued_ms - BOOST_MS[record.priority]
            wanted.append(
                Wanted(
                    lane,
                    1,
                    effective,
                    record.priority,
                    record.enqueued_ms,
                    view.lane.lane_id,
                    record.job_id,
                    paused=view.paused,
                    high_waiting=record.priority is Priority.HIGH,
                )
            )
        return wanted

    def _request(self, placed: Placed, wanted: Wanted) -> ClaimRequest:
        node = self._fleet.node(placed.node_id)
        return ClaimRequest(
            lane_id=wanted.source,
            node_id=placed.node_id,
            session=node.session if node is not None else "",
            token=secrets.token_hex(16),
            lease_ms=self._sessions.settings.lease_ms,
            job_id=wanted.job_id,
            avoid=not placed.alone,
        )

    async def _claim(self, requests: list[ClaimRequest], *, sure: bool) -> int:
        """Claims, looks and sends; `sure`: that jobs wait there was seen just now."""
        self._unsettled = requests
        claims, lanes = await self._store.jobs.claim_and_look(requests)
        self._unsettled = []
        self._outlook.looked(lanes)
        waiting = {view.lane.lane_id for view in lanes if view.waiting}
        self._none_left = not waiting
        moved = 0
        for request, claim in zip(requests, claims, strict=True):
            if claim is not None:
                moved += await self._send(claim)
            elif request.avoid and request.lane_id in waiting:
                # What waits there has just failed on this node: the next round asks another for it.
                self._fleet.avoid(request.node_id, request.job_id or request.lane_id, self._settings.avoid_seconds)
                moved += 1
        # A belief that was wrong: what does wait is known now.
        return moved or int(not sure and bool(waiting))

    async def _send(self, claim: Claim) -> bool:
        node = self._fleet.node(claim.job.node_id)
        if self._sessions.assign(claim):
            if node is not None:
                self._speeds.sent(claim, node)
            return True
        await self._store.jobs.release(claim.job.job_id, claim.token)
        self._outlook.doubt()
        return False


def _only_filled(before: NodeView, now: NodeView) -> bool:
    return now.slots_free < before.slots_free and replace(now, slots_free=before.slots_free) == before


def wanted_of(view: LaneView) -> Wanted:
    """A lane of the store as placement sees it."""
    return Wanted(
        view.lane,
        view.waiting,
        view.head_effective_ms,
        view.head_priority,
        view.oldest_enqueued_ms,
        view.lane.lane_id,
        head_owner_lag=view.head_owner_lag,
        paused=view.paused,
        high_waiting=view.high_waiting,
    )
