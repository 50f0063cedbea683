"""One agent's stream: what it says goes into the store, in order; what it must hear goes out through one writer."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator

import structlog
from fleet.v1 import node_pb2 as pb
from fleet.v1.types_pb2 import JobProgress

from fleet_server.domain.errors import Code, FleetError
from fleet_server.domain.job import Claim, JobRecord
from fleet_server.services.attempts import Attempt, AttemptBook
from fleet_server.services.beats import Beats
from fleet_server.services.completion import Ended
from fleet_server.services.handout import Handout, assignment
from fleet_server.services.nodes import beat_of
from fleet_server.services.reports import GivenBack, Reports, Started
from fleet_server.services.session_parts import SessionParts, SessionSettings

_log = structlog.get_logger("fleet.session")

__all__ = ["Session", "SessionSettings"]

MOST_IN_BATCH = 128
BATCH_BYTES = 1 << 20
"""A batch with so many bytes takes no further message: with the largest one it stays below what an agent receives."""
MAX_PREVIEW_BYTES = 65_536
"""What is larger is no preview."""


class Session:
    """The stream of one agent. `run()` is its whole life; `outgoing()` is read by the one writer.

    The agent's reports are settled in their order by one task and repeated while the store is away; heartbeats have a
    task of their own, so that neither waits for the other.
    """

    def __init__(self, session_id: str, hello: pb.Hello, parts: SessionParts, *, address: str = "") -> None:
        self.session_id = session_id
        self.node_id = hello.node_id
        self.instance_id = hello.instance_id
        self.address = address
        self.goodbye_at: float | None = None
        self.heard_at = _now()
        self.writing_since: float | None = None
        self.writer: asyncio.Task[object] | None = None
        self.ended = asyncio.Event()
        self.spool_settled = asyncio.Event()
        self._parts = parts
        self._settings = parts.settings
        self._book = AttemptBook()
        self._spooled = {one.token for one in hello.spooled}
        self._settling: dict[str, str] = {}
        self._outbox: deque[pb.ServerMessage] = deque()
        self._some_out = asyncio.Event()
        self._error: FleetError | None = None
        self._stop = asyncio.Event()
        self._told = False
        self._batches = hello.batches
        self._reports = Reports(
            hello.node_id,
            parts.store.jobs,
            parts.completions,
            backlog=self._settings.backlog,
            repeat_seconds=self._settings.repeat_seconds,
            unwanted=self.cancel,
            given_back=self._slots_changed,
            settled=self._on_settled,
            refused=self._on_refused,
        )
        self._beats = Beats(
            session_id, hello, parts, self._book, self._settling, answer=self._answer, replaced=self._replaced
        )
        self._handout = Handout(
            parts.inputs,
            send=lambda assign: self.send(pb.ServerMessage(assign=assign)),
            failed=self._on_complete,
            wanted=self._wanted,
            repeat_seconds=self._settings.repeat_seconds,
        )
        if not self._spooled:
            self.spool_settled.set()

    # What the rest of the server asks of it.

    @property
    def slots_free(self) -> int:
        """Slots that may be filled now; 0 once the stream is ending."""
        return 0 if self._stop.is_set() or self.goodbye_at is not None else self._book.slots_free

    @property
    def stopping(self) -> bool:
        """Whether the stream is ending: nothing more goes out that could be answered."""
        return self._stop.is_set()

    @property
    def description(self) -> bytes:
        """The agent's description as the store keeps it."""
        return self._beats.description

    @property
    def job_ids(self) -> tuple[str, ...]:
        """What the agent runs, by our book."""
        return self._book.job_ids()

    def adopt(self, kept: list[JobRecord]) -> None:
        """Takes over what the agent holds at its Hello: `kept` are the jobs that it goes on with."""
        first = beat_of(self._beats.hello)
        self._book.report(first.slots, first.slots_free, first.held)
        current = {record.token: record for record in kept}
        for attempt in self._book:
            record = current.get(attempt.token)
            attempt.cancelled = record is None
            if record is not None:
                attempt.lane_id = record.lane_id
                attempt.generation = record.generation
                attempt.attempt = record.attempt

    def assign(self, claim: Claim) -> bool:
        """Sends a claimed job down. False if the stream is ending: give the job back."""
        if self._stop.is_set() or self.goodbye_at is not None:
            return False
        record = claim.job
        self._book.add(
            Attempt(
                job_id=record.job_id,
                token=claim.token,
                spec=record.spec,
                lane_id=record.lane_id,
                generation=record.generation,
                attempt=record.attempt,
                accept_by=_now() + self._settings.accept_seconds,
            )
        )
        previews = self._parts.hub.previews_wanted(record.job_id)
        self._handout.give(assignment(claim, self._parts.fleet.node(self.node_id), previews=previews))
        self._slots_changed()
        return True

    def cancel(self, job_id: str, token: str) -> None:
        """Tells the agent to stop an attempt that it holds; its slot stays taken until it has."""
        attempt = self._book.get(token)
        if attempt is not None:
            attempt.cancelled = True
        self.send(pb.ServerMessage(cancel=pb.CancelAttempt(job_id=job_id, token=token)))

    def send(self, message: pb.ServerMessage) -> None:
        """Queues a control message. An agent that does not read loses its stream."""
        if len(self._outbox) >= self._settings.outbox:
            self.stop(_stuck())
            return
        self._outbox.append(message)
        self._some_out.set()

    def stop(self, error: FleetError | None = None) -> None:
        """Ends the stream, with an error or without; `ended` is set when all that was said has been settled."""
        if not self._stop.is_set():
            self._error = error
            self._stop.set()
            self._some_out.set()

    async def outgoing(self) -> AsyncGenerator[pb.ServerMessage, None]:
        """The messages for the agent, to its end; then raises what ended it."""
        while True:
            await self._some_out.wait()
            while self._outbox:
                message = self._next()
                self.writing_since = _now()
                yield message
                self.writing_since = None
            if self._stop.is_set():
                break
            self._some_out.clear()
        if self._error is not None:
            raise self._error

    def _next(self) -> pb.ServerMessage:
        """The first message that waits, with those behind it where the agent takes batches."""
        first = self._outbox.popleft()
        if not self._batches or not self._outbox or first.HasField("welcome"):
            first.session = self.session_id
            return first
        whole = pb.ServerMessage(session=self.session_id)
        messages, size = [first], first.ByteSize()
        while self._outbox and len(messages) < MOST_IN_BATCH and size < BATCH_BYTES:
            messages.append(self._outbox.popleft())
            size += messages[-1].ByteSize()
        whole.batch.messages.extend(messages)
        return whole

    # Its life.

    async def run(self, requests: AsyncIterator[pb.AgentMessage]) -> None:
        """Reads the agent to the stream's end or until `stop`, then settles what it said. Never raises."""
        reader = asyncio.create_task(self._read(requests))
        settler = asyncio.create_task(self._reports.run())
        tasks = [reader, settler, asyncio.create_task(self._beats.run()), asyncio.create_task(self._watch())]
        stopped = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait([*tasks, stopped], return_when=asyncio.FIRST_COMPLETED)
            reader.cancel()
            if not settler.done():
                await asyncio.wait([asyncio.ensure_future(self._reports.join())], timeout=self._settings.drain_seconds)
        finally:
            for task in (*tasks, stopped):
                task.cancel()
            for outcome in await asyncio.gather(*tasks, stopped, return_exceptions=True):
                if isinstance(outcome, FleetError):
                    self.stop(outcome)
                elif isinstance(outcome, Exception):
                    _log.error("session failed", node_id=self.node_id, exc_info=outcome)
                    self.stop(FleetError("INTERNAL", "the session failed in the server: dial again"))
            await self._handout.close()
            self.stop()
            self.ended.set()

    async def _read(self, requests: AsyncIterator[pb.AgentMessage]) -> None:
        async for message in requests:
            if message.session != self.session_id:
                self._parts.counters.ignored_messages += 1
                continue
            self.heard_at = _now()
            if message.WhichOneof("message") == "batch":
                for one in message.batch.messages:
                    await self._take(one)
            else:
                await self._take(message)

    async def _take(self, message: pb.AgentMessage) -> None:
        match message.WhichOneof("message"):
            case "heartbeat":
                self._beats.take(message.heartbeat)
                self._parts.fleet.beat(self.node_id, self._beats.hello, message.heartbeat, slots_free=self.slots_free)
            case "tick":
                self._on_tick(message.tick)
            case "preview":
                self._on_preview(message.preview)
            case "accepted":
                self._on_accepted(message.accepted)
            case "rejected":
                await self._on_rejected(message.rejected)
            case "started":
                await self._on_started(message.started)
            case "complete":
                await self._on_complete(message.complete)
            case "released":
                await self._give_back(message.released.job_id, message.released.token)
            case "stopped":
                self._book.end(message.stopped.token)
                self._slots_changed()
            case "goodbye":
                self.goodbye_at = _now()
                self._slots_changed()
            case "frame" if not self._wanted(message.frame.token):
                self._parts.counters.ignored_messages += 1
            case _:
                self._parts.pass_on(self.node_id, message)

    async def _watch(self) -> None:
        settings = self._settings
        while True:
            await asyncio.sleep(settings.watch_seconds)
            now = _now()
            for attempt in self._book.late(now):
                self._parts.counters.unaccepted += 1
                self.cancel(attempt.job_id, attempt.token)
                self._parts.fleet.avoid(self.node_id, attempt.lane_id, settings.avoid_seconds)
                await self._give_back(attempt.job_id, attempt.token, stopped=False)
            if self.writing_since is not None and now - self.writing_since > settings.write_seconds:
                self._parts.counters.stuck_writers += 1
                self.stop(_stuck())
                if self.writer is not None:
                    self.writer.cancel()
            if now - self.heard_at > settings.silent_seconds:
                self.stop(FleetError("TIMEOUT", f"nothing came for {settings.silent_seconds:g} s: dial again"))
            if self.goodbye_at is not None and now - self.goodbye_at > settings.goodbye_seconds:
                self.stop()

    # What the agent says.

    def _on_accepted(self, accepted: pb.JobAccepted) -> None:
        attempt = self._book.get(accepted.token)
        if attempt is None:
            # It came too late: the job has been given back.
            self.cancel(accepted.job_id, accepted.token)
            return
        attempt.accept_by = None

    async def _on_rejected(self, rejected: pb.JobRejected) -> None:
        self._parts.counters.rejected += 1
        attempt = self._book.get(rejected.token)
        if attempt is not None:
            self._parts.fleet.avoid(self.node_id, attempt.lane_id, self._settings.avoid_seconds)
        _log.info("job rejected", node_id=self.node_id, job_id=rejected.job_id, reason=rejected.reason)
        await self._give_back(rejected.job_id, rejected.token)

    async def _give_back(self, job_id: str, token: str, *, stopped: bool = True) -> None:
        self._book.end(token)
        await self._reports.put(GivenBack(job_id, token, stopped, "" if stopped else self.session_id))

    async def _on_started(self, started: pb.JobStarted) -> None:
        attempt = self._book.get(started.token)
        if attempt is not None:
            attempt.accept_by = None
        await self._reports.put(Started(started.job_id, started.token))

    def _on_tick(self, tick: pb.JobTick) -> None:
        progress = self._progress(tick)
        if progress is None:
            return
        for name in ("message", "text", "text_offset", "eta_seconds"):
            if tick.HasField(name):
                setattr(progress, name, getattr(tick, name))
        self._parts.hub.publish(progress)

    def _on_preview(self, preview: pb.JobPreview) -> None:
        progress = self._progress(preview)
        if progress is None or len(preview.preview.data) > MAX_PREVIEW_BYTES:
            return
        progress.preview.CopyFrom(preview.preview)
        self._parts.hub.publish(progress)

    def _progress(self, tick: pb.JobTick | pb.JobPreview) -> JobProgress | None:
        attempt = self._book.get(tick.token)
        if attempt is None or attempt.cancelled:
            self._parts.counters.ignored_messages += 1
            return None
        attempt.progress = max(0, min(tick.progress, 100))
        attempt.step = tick.step if tick.HasField("step") else None
        attempt.steps = tick.steps if tick.HasField("steps") else None
        return JobProgress(
            job_id=attempt.job_id,
            progress=attempt.progress,
            step=attempt.step,
            steps=attempt.steps,
            node_id=self.node_id,
            generation=attempt.generation,
            attempt=attempt.attempt,
        )

    async def _on_complete(self, complete: pb.JobComplete) -> None:
        if complete.token in self._settling:
            return
        self._settling[complete.token] = complete.job_id
        attempt = self._book.finish(complete.token)
        spec = attempt.spec if attempt is not None and not attempt.cancelled else b""
        # The end first: its caller waits; who gets the slot comes after.
        await self._reports.put(Ended(complete, spec))
        self._slots_changed()

    def _on_refused(self, complete: pb.JobComplete) -> None:
        """The agent keeps the end, and says it again."""
        self._settling.pop(complete.token, None)

    def _on_settled(self, complete: pb.JobComplete, outcome: pb.CompleteOutcome.ValueType) -> None:
        self._settling.pop(complete.token, None)
        self._spooled.discard(complete.token)
        if not self._spooled:
            self.spool_settled.set()
        self._parts.hub.forget(complete.job_id)
        ack = pb.CompleteAck(job_id=complete.job_id, token=complete.token, outcome=outcome)
        self.send(pb.ServerMessage(complete_ack=ack))

    def _answer(self, ack: pb.HeartbeatAck) -> None:
        self.send(pb.ServerMessage(heartbeat_ack=ack))

    def _replaced(self) -> None:
        self.stop(FleetError("TAKEN_OVER", "another stream of this node has taken over", code=Code.ABORTED))

    def _slots_changed(self) -> None:
        """Tells the rest of the server, once for all that changed in one go."""
        if not self._told:
            self._told = True
            asyncio.get_running_loop().call_soon(self._tell_slots)

    def _tell_slots(self) -> None:
        self._told = False
        view = self._parts.fleet.node(self.node_id)
        if view is not None and view.session == self.session_id:
            self._parts.fleet.occupy(
                self.node_id,
                slots_free=self.slots_free,
                running=self._book.job_ids(),
                draining=self.goodbye_at is not None,
            )

    def _wanted(self, token: str) -> bool:
        attempt = self._book.get(token)
        return attempt is not None and not attempt.cancelled and not self._stop.is_set()


def _stuck() -> FleetError:
    return FleetError("STREAM_STUCK", "the agent does not read its stream: dial again", code=Code.ABORTED)


def _now() -> float:
    return asyncio.get_running_loop().time()
