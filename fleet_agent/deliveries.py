"""Brings spooled ends to the server: the files first, then the JobComplete, until a CompleteAck.

Delivery is at least once: begun anew after each Welcome, repeated within a session, gone on with by the next agent
process on the same folder.
"""

from __future__ import annotations

import asyncio
import random
import time

import grpc
import structlog
from fleet.v1 import node_pb2, types_pb2

from fleet_agent.chores import Chores
from fleet_agent.link import Link
from fleet_agent.settings import AgentSettings
from fleet_agent.spool import Spool, SpoolEntry

_log = structlog.get_logger("fleet.agent.deliveries")
# The attempt is not the job's any more.
_UNWANTED = frozenset({grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.NOT_FOUND})
# The server will not take this file, however often it is sent.
_HOPELESS = frozenset({grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OUT_OF_RANGE, grpc.StatusCode.DATA_LOSS})
_FIRST_PAUSE = 0.2


class UnwantedError(Exception):
    """The server has no use for the end of this attempt."""


class Deliveries:
    """The ends that wait for their acknowledgement."""

    def __init__(self, settings: AgentSettings, spool: Spool) -> None:
        self._settings = settings
        self._spool = spool
        self._entries: dict[str, SpoolEntry] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._kept: dict[str, asyncio.Event] = {}
        self._link: Link | None = None
        self._chores: Chores | None = None

    async def open(self, chores: Chores) -> None:
        """Reads what an earlier process left."""
        self._chores = chores
        entries = await asyncio.to_thread(self._spool.entries)
        self._entries = {entry.token: entry for entry in entries}
        if entries:
            _log.info("ends wait to be delivered", count=len(entries))

    def __contains__(self, token: str) -> bool:
        return token in self._entries

    def held(self) -> list[node_pb2.HeldAttempt]:
        """Attempts whose end is not yet acknowledged."""
        return [
            node_pb2.HeldAttempt(job_id=entry.complete.job_id, token=token, progress=100)
            for token, entry in self._entries.items()
        ]

    def connected(self, link: Link) -> None:
        """A Welcome has come: delivers everything."""
        self._link = link
        for entry in self._entries.values():
            self._deliver(entry, link)

    def disconnected(self) -> None:
        """The session is over: deliveries wait for the next one."""
        self._link = None
        for task in self._tasks.values():
            task.cancel()
        self._tasks.clear()
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

    def begin(self, entry: SpoolEntry) -> None:
        """Sends the files of an end that is still being written to the disk; the end itself is said after `add`."""
        self._kept[entry.token] = asyncio.Event()
        if self._link is not None:
            self._deliver(entry, self._link)

    def abandon(self, token: str) -> None:
        """What was begun is not to be said."""
        self._kept.pop(token, None)
        task = self._tasks.pop(token, None)
        if task is not None:
            task.cancel()

    def add(self, entry: SpoolEntry) -> None:
        """Takes an end over from its slot; it is on the disk."""
        self._entries[entry.token] = entry
        kept = self._kept.pop(entry.token, None)
        if kept is not None:
            kept.set()
        if self._link is not None and entry.token not in self._tasks:
            self._deliver(entry, self._link)

    def acknowledged(self, token: str) -> None:
        """The server has settled an end: forget it."""
        task = self._tasks.pop(token, None)
        if task is not None:
            task.cancel()
        timer = self._timers.pop(token, None)
        if timer is not None:
            timer.cancel()
        if self._entries.pop(token, None) is None or self._spool.forget(token):
            return
        if self._chores is not None:
            self._chores.spawn(asyncio.to_thread(self._spool.remove, token), f"forget {token}")

    def _deliver(self, entry: SpoolEntry, link: Link) -> None:
        assert self._chores is not None
        if not entry.files:
            self._say(entry, link)
            return
        self._tasks[entry.token] = self._chores.spawn(self._delivery(entry, link), f"deliver {entry.token}")

    def _say(self, entry: SpoolEntry, link: Link) -> None:
        """Says an end that has no files, now and every few seconds."""
        link.say(node_pb2.AgentMessage(complete=entry.complete))
        loop = asyncio.get_running_loop()
        self._timers[entry.token] = loop.call_later(self._settings.resend_seconds, self._say, entry, link)

    async def _delivery(self, entry: SpoolEntry, link: Link) -> None:
        kept = self._kept.get(entry.token)
        try:
            complete = await self._uploaded(entry, link)
        except UnwantedError as error:
            _log.info("an output is not wanted any more", job_id=entry.complete.job_id, why=str(error))
            self.acknowledged(entry.token)
            return
        if kept is not None:
            await kept.wait()
        while True:
            link.say(node_pb2.AgentMessage(complete=complete))
            await asyncio.sleep(self._settings.resend_seconds)

    async def _uploaded(self, entry: SpoolEntry, link: Link) -> node_pb2.JobComplete:
        """The end with its receipts, all files being on the server's disk. Raises UnwantedError."""
        complete = node_pb2.JobComplete()
        complete.CopyFrom(entry.complete)
        begun = time.monotonic()
        for index in range(len(entry.files)):
            try:
                receipt = await self._upload(entry, index, link)
            except OSError as error:
                return _undeliverable(complete, f"the node cannot read it back: {error.strerror or error}")
            except grpc.aio.AioRpcError as error:
                return _undeliverable(complete, f"{error.code().name}: {error.details()}")
            complete.outputs[index].receipt.CopyFrom(receipt)
        complete.upload_seconds = time.monotonic() - begun
        return complete

    async def _upload(self, entry: SpoolEntry, index: int, link: Link) -> node_pb2.OutputReceipt:
        """One file, tried until it is taken. Raises UnwantedError, OSError, or AioRpcError where no try will help."""
        pause, patient = _FIRST_PAUSE, False
        while True:
            try:
                return await link.uploader.upload(entry, index, patient=patient)
            except grpc.aio.AioRpcError as error:
                patient = error.code() is grpc.StatusCode.INTERNAL
                if error.code() in _UNWANTED:
                    raise UnwantedError(error.details()) from error
                if error.code() in _HOPELESS:
                    raise
                _log.warning(
                    "an upload is tried again",
                    job_id=entry.complete.job_id,
                    code=error.code().name,
                    detail=error.details(),
                )
            await asyncio.sleep(random.uniform(pause / 2, pause))
            pause = min(pause * 2, self._settings.upload_retry_seconds)


def _undeliverable(complete: node_pb2.JobComplete, why: str) -> node_pb2.JobComplete:
    """A success whose files cannot be had is a failure that another attempt may mend."""
    _log.error("an output cannot be delivered", job_id=complete.job_id, why=why)
    detail = f"an output of the attempt could not be delivered: {why}"
    error = types_pb2.JobError(detail=detail[:2000], code="INTERNAL", reason="ENGINE_FAILED")
    return node_pb2.JobComplete(
        job_id=complete.job_id, token=complete.token, error=error, retryable=True, metadata=complete.metadata
    )
