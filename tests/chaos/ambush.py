"""Ambushes: reports of attempts that are held on their way up until the job has gone on without them.

A job whose prompt has the word `ambush` is known by its Assign. The report of each of its attempts is caught, and with
it all that its node says from then on, heartbeats and a new Hello too, until the attempt is let go: so its lease is
lost, and the report comes late. With the word `silence` as well, it is held as soon as its engine has begun. `courses`
says when it goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from dataclasses import dataclass, field
from typing import Any

import grpc
from fleet.v1 import node_pb2 as pb

WORD, SILENCE = "ambush", "silence"
HOLD_SECONDS = 60.0
"""Nothing is held longer, whatever its course does."""


@dataclass(slots=True, eq=False)
class Attempt:
    """One attempt of an ambushed job. `caught` is set with its `report`, `free` lets it go; `answers` are the acks.
    `forgotten`: nobody let it go in time, and it went by itself, perhaps before it was late. `given`, `renewed`: when
    it was given to its node, and when its node last named it to the server, in seconds of one clock."""

    job_id: str
    token: str
    node_id: str
    generation: int
    report: pb.JobComplete | None = None
    forgotten: bool = False
    silenced: bool = False
    given: float = field(default_factory=time.monotonic)
    renewed: float = math.inf
    caught: asyncio.Event = field(default_factory=asyncio.Event)
    free: asyncio.Event = field(default_factory=asyncio.Event)
    answers: asyncio.Queue[pb.CompleteOutcome.ValueType] = field(default_factory=asyncio.Queue)

    @property
    def held(self) -> bool:
        return self.caught.is_set() and not self.free.is_set()


class Stream:
    """A node's stream as it passes the post."""

    def __init__(self, call: Any) -> None:
        self.node_id = ""
        self.session = ""
        self._call = call
        self._writing = asyncio.Lock()

    async def write(self, message: bytes) -> None:
        """Up to the server; one at a time."""
        async with self._writing:
            await self._call.write(message)


class Ambushes:
    """What the post knows of ambushed jobs. `assigned` has every Assign that passed: job, generation, number, node."""

    def __init__(self) -> None:
        self.attempts: dict[str, Attempt] = {}
        self.assigned: list[tuple[str, int, int, str]] = []
        self._streams: dict[str, Stream] = {}
        self._over: set[str] = set()
        self._all_over = False

    def of(self, job_id: str) -> list[Attempt]:
        """The attempts of a job, in their order."""
        return [attempt for attempt in self.attempts.values() if attempt.job_id == job_id]

    def open(self, job_id: str | None = None) -> None:
        """Lets go what is held of one job or of all, and holds nothing of it any more."""
        if job_id is None:
            self._all_over = True
        else:
            self._over.add(job_id)
        for attempt in self.attempts.values():
            if job_id in (None, attempt.job_id):
                attempt.free.set()

    def hold(self, job_id: str) -> None:
        """Holds the reports of the job's further attempts again."""
        self._over.discard(job_id)

    async def say_again(self, attempt: Attempt) -> bool:
        """The report once more, on its node's stream or another's; False where there is none."""
        streams = [stream for node, stream in self._streams.items() if stream.session and not self._held(node)]
        streams.sort(key=lambda stream: stream.node_id != attempt.node_id)
        if not streams or attempt.report is None:
            return False
        message = pb.AgentMessage(session=streams[0].session, complete=attempt.report)
        with contextlib.suppress(grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.InvalidStateError):
            await streams[0].write(message.SerializeToString())
            return True
        return False

    # What the post hears.

    def gone(self, stream: Stream) -> None:
        """The stream is over."""
        if self._streams.get(stream.node_id) is stream:
            del self._streams[stream.node_id]

    async def up(self, stream: Stream, message: pb.AgentMessage) -> bool:
        """Waits while the node is held; whether the message is about an ambushed job, and must not be lost."""
        if message.HasField("hello"):
            stream.node_id = message.hello.node_id
        ours, begun = False, list[Attempt]()
        for one in _parts(message):
            attempt = self.attempts.get(_token(one))
            ours = ours or attempt is not None
            if attempt is not None and one.HasField("complete"):
                self._catch(attempt, one.complete)
            if attempt is not None and attempt.silenced and one.HasField("started"):
                begun.append(attempt)
        for attempt in self._held(stream.node_id):
            try:
                await asyncio.wait_for(attempt.free.wait(), HOLD_SECONDS)
            except TimeoutError:
                attempt.forgotten = True
                attempt.free.set()
        for one in _parts(message):
            for held in (*one.hello.held, *one.heartbeat.held):
                if held.token in self.attempts:
                    self.attempts[held.token].renewed = time.monotonic()
        for attempt in begun:
            # What comes after this message is held.
            attempt.caught.set()
        return ours

    def down(self, stream: Stream, message: pb.ServerMessage) -> bool:
        """Notes what the server says; whether it is about an ambushed job, and must not be lost."""
        if message.HasField("welcome"):
            stream.session = message.session
            self._streams[stream.node_id] = stream
        ours = False
        for one in _parts(message):
            if one.HasField("assign"):
                self._assign(stream.node_id, one.assign)
            attempt = self.attempts.get(_token(one))
            ours = ours or attempt is not None
            if attempt is not None and one.HasField("complete_ack"):
                attempt.answers.put_nowait(one.complete_ack.outcome)
        return ours

    def _assign(self, node_id: str, assign: pb.Assign) -> None:
        self.assigned.append((assign.job_id, assign.generation, assign.attempt, node_id))
        words = assign.payload.image_gen.prompt.split()
        if WORD in words and assign.token not in self.attempts:
            attempt = Attempt(assign.job_id, assign.token, node_id, assign.generation, silenced=SILENCE in words)
            self.attempts[assign.token] = attempt
            if self._all_over or assign.job_id in self._over:
                attempt.free.set()

    def _catch(self, attempt: Attempt, report: pb.JobComplete) -> None:
        if attempt.report is None:
            attempt.report = pb.JobComplete()
            attempt.report.CopyFrom(report)
            attempt.caught.set()

    def _held(self, node_id: str) -> list[Attempt]:
        return [attempt for attempt in self.attempts.values() if attempt.node_id == node_id and attempt.held]


def _parts(message: Any) -> Any:
    return message.batch.messages if message.HasField("batch") else [message]


def _token(one: Any) -> str:
    """The attempt that a message is about; "" where it is about none."""
    kind = one.WhichOneof("message")
    return getattr(getattr(one, kind), "token", "") if kind else ""
