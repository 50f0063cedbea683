"""What this replica learns from work: speeds and load times of nodes, and when the slots it filled will be free."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import orjson
import structlog
from fleet.v1 import types_pb2
from fleet.v1.node_pb2 import JobComplete

from fleet_server.domain.errors import FleetError
from fleet_server.domain.job import Claim
from fleet_server.domain.node import NodeView
from fleet_server.domain.placement import load_seconds
from fleet_server.domain.quarantine import Quarantine
from fleet_server.domain.ranking import LORA_LOAD_SECONDS
from fleet_server.domain.speeds import SpeedBook, Unit, Work
from fleet_server.services.lanes import lane_of

_log = structlog.get_logger("fleet.speeds")

UNKNOWN_RUN_SECONDS = 10.0
"""What a job is taken to run where nothing like it has been measured."""

WRITE_SECONDS = 5.0
ANSWER_TOKENS = 512


class Shelf(Protocol):
    """Where speeds are kept over a restart: one text a node."""

    async def read(self) -> Mapping[str, bytes]:
        """All that is kept."""
        ...

    async def write(self, rows: Mapping[str, bytes]) -> None:
        """Keeps the texts of these nodes."""
        ...


@dataclass(slots=True)
class _Sent:
    """An attempt on its way or running."""

    job_id: str
    node_id: str
    lane_id: str
    model: str
    engine: str
    work: Work
    loras: int
    cold: bool
    end_ms: int


def work_of(spec: types_pb2.JobSpec) -> Work:
    """How much a job asks for, as far as its spec says: pictures pixels x steps, films times frames, text tokens."""
    kind = spec.payload.WhichOneof("kind")
    if kind == "image_gen":
        image = spec.payload.image_gen
        return Work(Unit.PIXEL_STEPS, max(1.0, float(image.width) * image.height * image.steps))
    if kind == "video_gen":
        video = spec.payload.video_gen
        return Work(Unit.PIXEL_STEPS, max(1.0, float(video.width) * video.height * video.steps * video.frames))
    if kind == "llm_inference":
        return Work(Unit.TOKENS, float(spec.payload.llm_inference.max_tokens or ANSWER_TOKENS))
    return Work(Unit.JOBS, 1.0)


class Speeds:
    """The measurements, fed by dispatch (what was sent) and by completions (how long it took).

    `clock` gives Unix ms. `run()` is one task: it reads what is kept, then writes what has changed.
    """

    def __init__(
        self, *, clock: Callable[[], int], shelf: Shelf | None = None, write_seconds: float = WRITE_SECONDS
    ) -> None:
        self.book = SpeedBook()
        self.quarantine = Quarantine()
        self._clock = clock
        self._shelf = shelf
        self._write_seconds = write_seconds
        self._sent: dict[str, _Sent] = {}
        self._by_node: dict[str, set[str]] = {}
        self._stamps: dict[str, int] = {}
        self._views: dict[str, tuple[NodeView, tuple[object, ...], NodeView]] = {}
        self._changed: set[str] = set()
        self._some = asyncio.Event()

    # What dispatch says.

    def sent(self, claim: Claim, node: NodeView) -> None:
        """A claimed job is on its way to the node."""
        spec = types_pb2.JobSpec.FromString(claim.job.spec)
        # The record's lane may be a mixed one, which says nothing of its jobs.
        lane = lane_of(spec)
        work = work_of(spec)
        self.book.saw_job(lane.lane_id, work)
        file = node.models.get(lane.model)
        run = self.book.seconds(node, lane.model, work)
        seconds = load_seconds(node, lane, self.book) + (UNKNOWN_RUN_SECONDS if run is None else run)
        self._sent[claim.token] = _Sent(
            claim.job.job_id,
            node.node_id,
            lane.lane_id,
            lane.model,
            file.engine if file is not None else "",
            work,
            len(lane.loras),
            bool(lane.model) and node.loaded_model(lane.model) is None,
            self._clock() + int(seconds * 1000),
        )
        self._by_node.setdefault(node.node_id, set()).add(claim.token)
        self._stamp(node.node_id)

    def seen(self, node: NodeView, running: Collection[str], slots_free: int) -> NodeView:
        """The node for placement: with what is in quarantine there and when its taken slots should be free.

        The same view again while nothing has changed, so that verdicts on it need no second look.
        """
        quarantined = self.quarantine.models(node.node_id, self._clock() / 1000)
        known = self._views.get(node.node_id)
        stamp = (self._stamps.get(node.node_id, 0), running, slots_free, quarantined)
        if known is not None and known[0] is node and known[1] == stamp:
            return known[2]
        free_at = self._free_at_ms(node.node_id, running)
        view = replace(node, slots_free=slots_free, free_at_ms=free_at, quarantined=quarantined)
        self._warmed(node)
        self._views[node.node_id] = (node, (self._stamps.get(node.node_id, 0), *stamp[1:]), view)
        return view

    def _warmed(self, node: NodeView) -> None:
        for one in node.loaded:
            speed = one.pixel_steps_per_second
            if speed is not None and self.book.warmed(node.node_id, one.name, one.engine, Unit.PIXEL_STEPS, speed):
                self._changed.add(node.node_id)
                self._some.set()

    def _free_at_ms(self, node_id: str, running: Collection[str]) -> tuple[int, ...]:
        held = set(running)
        ends = []
        for token in tuple(self._by_node.get(node_id, ())):
            sent = self._sent[token]
            if sent.job_id in held:
                held.discard(sent.job_id)
                ends.append(sent.end_ms)
            else:
                self._over(token)
        ends += [self._clock() + int(UNKNOWN_RUN_SECONDS * 1000)] * len(held)
        return tuple(sorted(ends))

    # What completions say.

    def taken(self, node_id: str, complete: JobComplete) -> None:
        """An attempt's report took effect."""
        sent = self._over(complete.token)
        if sent is None or sent.node_id != node_id:
            return
        if complete.HasField("error"):
            self._failed(sent, complete.error.reason)
            return
        self.quarantine.worked(node_id, sent.model)
        if complete.run_seconds > 0:
            work = sent.work
            if work.unit is Unit.TOKENS and complete.usage.completion_tokens > 0:
                work = Work(Unit.TOKENS, float(complete.usage.completion_tokens))
                self.book.saw_job(sent.lane_id, work)
            self.book.ran(node_id, sent.model, sent.engine, work, complete.run_seconds)
        load = complete.load_seconds - sent.loras * LORA_LOAD_SECONDS
        if sent.cold and load > 0:
            self.book.loaded(node_id, sent.model, load)
        self._changed.add(node_id)
        self._some.set()

    def fetched(self, node_id: str, size_bytes: int, seconds: float) -> None:
        """The node has brought so many bytes from the buckets within `seconds`."""
        self.book.fetched(node_id, size_bytes, seconds)
        self._changed.add(node_id)
        self._some.set()

    def forget(self, node_id: str) -> None:
        """The node was deleted."""
        self.book.forget(node_id)
        self.quarantine.forget(node_id)
        for token in tuple(self._by_node.get(node_id, ())):
            self._over(token)
        self._views.pop(node_id, None)
        self._stamps.pop(node_id, None)

    def _failed(self, sent: _Sent, reason: str) -> None:
        # A report of a failure does not say whether the load or the run failed; what was in memory had been loaded.
        if sent.cold and self.quarantine.failed(sent.node_id, sent.model, sent.job_id, reason, self._clock() / 1000):
            _log.warning("model quarantined on a node", node_id=sent.node_id, model=sent.model, reason=reason)

    def _stamp(self, node_id: str) -> None:
        self._stamps[node_id] = self._stamps.get(node_id, 0) + 1

    def _over(self, token: str) -> _Sent | None:
        sent = self._sent.pop(token, None)
        if sent is not None:
            self._stamp(sent.node_id)
            tokens = self._by_node.get(sent.node_id)
            if tokens is not None:
                tokens.discard(token)
                if not tokens:
                    del self._by_node[sent.node_id]
        return sent

    # Over a restart.

    async def run(self) -> None:
        """Keeps what is learned, until cancelled. A store that is away costs measurements, nothing else."""
        if self._shelf is None:
            return
        await self._read(self._shelf)
        while True:
            await self._some.wait()
            self._some.clear()
            rows = {node_id: orjson.dumps(self.book.dump(node_id)) for node_id in self._changed}
            self._changed.clear()
            try:
                await self._shelf.write(rows)
            except FleetError as error:
                _log.warning("speeds not kept", detail=error.detail)
                self._changed.update(rows)
                self._some.set()
            await asyncio.sleep(self._write_seconds)

    async def _read(self, shelf: Shelf) -> None:
        while True:
            try:
                rows = await shelf.read()
                break
            except FleetError as error:
                _log.warning("speeds not read yet", detail=error.detail)
                await asyncio.sleep(self._write_seconds)
        for node_id, text in rows.items():
            try:
                kept: Any = orjson.loads(text)
                self.book.restore(node_id, kept)
            except (ValueError, TypeError, AttributeError, KeyError):
                _log.warning("kept speeds are unreadable and left out", node_id=node_id)
