"""Heartbeats of one session: leases, the last percentages, the node's description and its readings."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping

import structlog
from fleet.v1 import node_pb2 as pb

from fleet_server.domain.errors import FleetError
from fleet_server.services.attempts import AttemptBook
from fleet_server.services.nodes import description_of, with_inventory
from fleet_server.services.session_parts import SessionParts
from fleet_server.store import Held

_log = structlog.get_logger("fleet.session")


class Beats:
    """Writes heartbeats down, the latest alone where they come faster than the store takes them.

    `settling` (token to job id) are attempts whose end waits for the store: their leases are kept too. `answer` sends
    the acknowledgement; `replaced` is called when the store knows another session for the node.
    """

    def __init__(
        self,
        session_id: str,
        hello: pb.Hello,
        parts: SessionParts,
        book: AttemptBook,
        settling: Mapping[str, str],
        *,
        answer: Callable[[pb.HeartbeatAck], None],
        replaced: Callable[[], None],
    ) -> None:
        self.hello = hello
        self.description = description_of(hello)
        self._session_id = session_id
        self._parts = parts
        self._book = book
        self._settling = settling
        self._answer = answer
        self._replaced = replaced
        self._described_at = _now()
        self._described = hello
        self._written_at = -math.inf
        self._latest: pb.AgentHeartbeat | None = None
        self._some = asyncio.Event()

    def take(self, beat: pb.AgentHeartbeat) -> None:
        """A heartbeat came: `hello` and the book are what it says, the rest follows. Never waits."""
        now = _now()
        changed = with_inventory(self.hello, beat, now - self._described_at)
        if changed is not self.hello:
            self.hello, self._described_at = changed, now
        self._book.report(beat.slots, beat.slots_free, beat.held)
        self._latest = beat
        self._some.set()

    async def run(self) -> None:
        """Writes beats down until cancelled, and tells the agent at once when somebody begins to look at previews."""
        end = self._parts.hub.subscribe_audience(self._tell_audience)
        try:
            await self._write_down()
        finally:
            end()

    def _tell_audience(self) -> None:
        sequence = self._latest.sequence if self._latest is not None else 0
        wanted = [one.token for one in self._book if self._parts.hub.previews_wanted(one.job_id)]
        self._answer(pb.HeartbeatAck(sequence=sequence, preview_tokens=wanted))

    async def _write_down(self) -> None:
        while True:
            await self._some.wait()
            self._some.clear()
            beat = self._latest
            if beat is None:
                continue
            try:
                drops = await self._renew(beat)
                await self._describe()
            except FleetError as error:
                # Leases outlast a short absence of the store, and nothing is reaped right after it.
                _log.warning("heartbeat not kept", node_id=self.hello.node_id, detail=error.detail)
                continue
            wanted = [one.token for one in beat.held if self._parts.hub.previews_wanted(one.job_id)]
            self._answer(pb.HeartbeatAck(sequence=beat.sequence, drop_tokens=drops, preview_tokens=wanted))

    async def _renew(self, beat: pb.AgentHeartbeat) -> list[str]:
        """Prolongs the leases of what the beat names; the tokens that the agent must drop."""
        named = {one.token for one in beat.held}
        held = [self._held(one) for one in beat.held]
        held += [Held(job_id, token) for token, job_id in self._settling.items() if token not in named]
        if not held:
            return []
        dropped = await self._parts.store.jobs.renew(held, self._parts.settings.lease_ms)
        drops = [token for token in dropped if token in named and token not in self._settling]
        for token in drops:
            attempt = self._book.get(token)
            if attempt is not None:
                attempt.cancelled = True
        return drops

    async def _describe(self) -> None:
        """Keeps the description where it has changed, and the last readings every few seconds: leases are the
        authority, and readings are read from memory."""
        nodes, fleet, node_id, hello = self._parts.store.nodes, self._parts.fleet, self.hello.node_id, self.hello
        if hello is not self._described:
            described = description_of(hello)
            if described != self.description:
                await nodes.update_info(node_id, self._session_id, described)
                self.description = described
                fleet.described(node_id, described)
            self._described = hello
        now = _now()
        if now - self._written_at < self._parts.settings.persist_seconds:
            return
        seen = fleet.heartbeat(node_id)
        if seen is not None and not await nodes.heartbeat(node_id, self._session_id, seen.SerializeToString()):
            self._replaced()
        self._written_at = now

    def _held(self, one: pb.HeldAttempt) -> Held:
        attempt = self._book.get(one.token)
        if attempt is not None and attempt.progress is not None and attempt.progress >= one.progress:
            return Held(one.job_id, one.token, attempt.progress, attempt.step, attempt.steps)
        step = one.step if one.HasField("step") else None
        steps = one.steps if one.HasField("steps") else None
        return Held(one.job_id, one.token, one.progress, step, steps)


def _now() -> float:
    return asyncio.get_running_loop().time()
