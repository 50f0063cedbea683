"""The work of an agent: attempts in slots, their ends in the spool, and the delivery of those ends.

An attempt runs on whether or not the server can be reached. Its end is on the disk before the slot is free again, and
is delivered at least once: after each Welcome, until a CompleteAck.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import time
from collections.abc import Coroutine, Iterable
from pathlib import Path
from typing import Any

import grpc
import structlog
from fleet.v1 import node_pb2

from fleet_agent import frames
from fleet_agent.attempt import Attempt, RefusedError, Stop, completion, failure, plan
from fleet_agent.inventory import Inventory
from fleet_agent.outbox import Outbox
from fleet_agent.settings import AgentSettings
from fleet_agent.slot_process import SlotCrashedError, SlotProcess
from fleet_agent.spool import Spool, SpoolEntry
from fleet_agent.upload import Uploader

_log = structlog.get_logger("fleet.agent")
_FINAL = frozenset({grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT})


class Runner:
    """Slots and spool of one agent. `open` starts the slots; tasks belong to the group given there."""

    def __init__(self, settings: AgentSettings, inventory: Inventory, spool: Spool) -> None:
        self._settings = settings
        self._inventory = inventory
        self._spool = spool
        folders = (settings.models_folder, settings.data_dir)
        self._slots = [SlotProcess(index, *folders) for index in range(settings.slots)]
        self._running: dict[str, Attempt] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._spooled: dict[str, SpoolEntry] = {}
        self._deliveries: dict[str, asyncio.Task[None]] = {}
        self._outbox: Outbox | None = None
        self._session = ""
        self._uploader: Uploader | None = None
        self._tasks: asyncio.TaskGroup | None = None
        self._own: set[asyncio.Task[None]] = set()

    async def open(self, tasks: asyncio.TaskGroup) -> None:
        """Reads the spool and starts every slot's child; one that does not start is tried again with its first task."""
        self._tasks = tasks
        entries = await asyncio.to_thread(self._spool.entries)
        self._spooled = {entry.token: entry for entry in entries}
        for slot in self._slots:
            with contextlib.suppress(SlotCrashedError):
                await slot.start()

    def cancel_tasks(self) -> None:
        """Ends deliveries and watches under way; what is spooled stays spooled."""
        for task in list(self._own):
            task.cancel()

    async def close(self) -> None:
        """Ends every child; call it when no attempt is running."""
        await asyncio.gather(*(slot.close() for slot in self._slots))

    @property
    def slots_free(self) -> int:
        return len(self._slots) - len(self._running)

    def running(self) -> list[node_pb2.HeldAttempt]:
        """Attempts in slots."""
        return [attempt.held() for attempt in self._running.values()]

    def spooled(self) -> list[node_pb2.HeldAttempt]:
        """Attempts whose end is not yet acknowledged."""
        return [
            node_pb2.HeldAttempt(job_id=entry.complete.job_id, token=token, progress=100)
            for token, entry in self._spooled.items()
        ]

    def loaded(self) -> list[node_pb2.LoadedFile]:
        """Models in the memory of the slots' children."""
        found: dict[tuple[str, str], node_pb2.LoadedFile] = {}
        for slot in self._slots:
            for model in slot.loaded:
                found[model["engine"], model["name"]] = node_pb2.LoadedFile(
                    name=model["name"],
                    engine=model["engine"],
                    memory_bytes=model["memory_bytes"],
                    loras=model["loras"],
                )
        return list(found.values())

    def connected(self, session: str, outbox: Outbox, uploader: Uploader, kill_tokens: Iterable[str]) -> None:
        """A Welcome has come: says again what matters, and delivers what is spooled."""
        self._session, self._outbox, self._uploader = session, outbox, uploader
        self.stop(kill_tokens, Stop.DROPPED)
        for attempt in self._running.values():
            if attempt.started:
                self._say(started=node_pb2.JobStarted(job_id=attempt.assign.job_id, token=attempt.token))
        for entry in self._spooled.values():
            self._deliver(entry)

    def disconnected(self) -> None:
        """The session is over: deliveries wait for the next one."""
        self._outbox = None
        for task in self._deliveries.values():
            task.cancel()

    def assign(self, assign: node_pb2.Assign) -> None:
        """Takes work, or says why not."""
        if assign.token in self._running or assign.token in self._spooled:
            return
        try:
            attempt = self._plan(assign)
        except RefusedError as refusal:
            self._say(
                rejected=node_pb2.JobRejected(
                    job_id=assign.job_id, token=assign.token, reason=refusal.reason, detail=refusal.detail
                )
            )
            return
        self._running[assign.token] = attempt
        self._idle.clear()
        self._say(accepted=node_pb2.JobAccepted(job_id=assign.job_id, token=assign.token))
        self._spawn(self._run(attempt), f"attempt {assign.token}")

    def stop(self, tokens: Iterable[str], why: Stop) -> None:
        """Stops attempts; an engine that does not stop in time is killed."""
        for token in tokens:
            attempt = self._running.get(token)
            if attempt is not None and attempt.stop is None:
                attempt.stop = why
                attempt.slot.cancel(token)
                self._spawn(self._kill_later(attempt), f"stop {token}")
            elif attempt is None and why is Stop.CANCELLED:
                self._say_stopped(token)

    async def release(self) -> None:
        """Stops everything and gives it back, uncounted; returns when the slots are free."""
        self.stop(list(self._running), Stop.RELEASED)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.stop_grace_seconds + self._settings.cancel_grace_seconds):
                await self._idle.wait()

    def acknowledged(self, token: str) -> None:
        """The server has settled an end: forget it."""
        entry = self._spooled.pop(token, None)
        delivery = self._deliveries.pop(token, None)
        if delivery is not None:
            delivery.cancel()
        if entry is not None:
            self._spawn(asyncio.to_thread(self._spool.remove, token), f"forget {token}")

    def show_previews(self, tokens: Iterable[str]) -> None:
        """Whose pictures in the making somebody looks at."""
        wanted = set(tokens)
        for token, attempt in self._running.items():
            attempt.previews = token in wanted

    def _plan(self, assign: node_pb2.Assign) -> Attempt:
        busy = {id(attempt.slot) for attempt in self._running.values()}
        slot = next((slot for slot in self._slots if id(slot) not in busy), None)
        if slot is None:
            raise RefusedError("SLOTS_FULL", "every slot of this node is taken")
        if shutil.disk_usage(self._settings.data_dir).free < self._settings.disk_floor_bytes:
            floor = self._settings.disk_floor_bytes
            raise RefusedError("DISK_FULL", f"less than {floor:,} bytes are free on this node")
        slot = self._best_slot(assign.model, busy) or slot
        try:
            folder = self._spool.work_folder(assign.token)
        except OSError as error:
            raise RefusedError("DISK_FULL", f"no folder for the outputs: {error.strerror}") from error
        return plan(assign, slot, self._inventory, folder)

    def _best_slot(self, model: str, busy: set[int]) -> SlotProcess | None:
        """A free slot whose child has the model loaded."""
        for slot in self._slots:
            if id(slot) not in busy and any(loaded["name"] == model for loaded in slot.loaded):
                return slot
        return None

    async def _run(self, attempt: Attempt) -> None:
        """Runs an attempt to its end; the slot is free when its end is on the disk."""
        complete: node_pb2.JobComplete | None = None
        outputs: list[tuple[Path, str]] = []
        timeout = asyncio.get_running_loop().call_later(
            attempt.assign.timeout_seconds, self.stop, [attempt.token], Stop.TIMEOUT
        )
        try:
            async for event, blob in attempt.slot.run(attempt.task):
                if event["event"] in ("done", "failed"):
                    complete = completion(attempt, event)
                    outputs = [(Path(o["path"]), o["content_type"]) for o in event.get("outputs", ())]
                else:
                    self._heard(attempt, event, blob)
        except (SlotCrashedError, frames.BadFrameError) as crash:
            attempt.slot.kill()
            complete = failure(attempt, "ENGINE_FAILED", str(crash), True)
        finally:
            timeout.cancel()
        await self._ended(attempt, complete, outputs)

    def _heard(self, attempt: Attempt, event: frames.Message, blob: bytes) -> None:
        job_id, token = attempt.assign.job_id, attempt.token
        if event["event"] == "started":
            attempt.started = True
            self._say(started=node_pb2.JobStarted(job_id=job_id, token=token))
        elif event["event"] == "progress":
            attempt.step, attempt.steps = event["step"], event["steps"]
            tick = node_pb2.JobTick(
                job_id=job_id,
                token=token,
                progress=attempt.progress,
                step=attempt.step,
                steps=attempt.steps,
                message=event["message"],
            )
            if self._outbox is not None:
                self._outbox.tick(node_pb2.AgentMessage(session=self._session, tick=tick))
        elif event["event"] == "preview" and attempt.previews and self._outbox is not None:
            preview = node_pb2.JobPreview(job_id=job_id, token=token, progress=attempt.progress)
            if attempt.steps:
                preview.step, preview.steps = attempt.step, attempt.steps
            preview.preview.content_type, preview.preview.data = event["content_type"], blob
            self._outbox.preview(node_pb2.AgentMessage(session=self._session, preview=preview))

    async def _ended(
        self, attempt: Attempt, complete: node_pb2.JobComplete | None, outputs: list[tuple[Path, str]]
    ) -> None:
        token = attempt.token
        if self._outbox is not None:
            self._outbox.forget(token)
        if attempt.stop is Stop.TIMEOUT and (complete is None or complete.HasField("error")):
            seconds = attempt.assign.timeout_seconds
            complete = failure(attempt, "TIMEOUT", f"the attempt ran longer than its {seconds:g} seconds", True)
        given_up = attempt.stop not in (None, Stop.TIMEOUT)
        if complete is None or (given_up and (attempt.stop is not Stop.RELEASED or complete.HasField("error"))):
            await asyncio.to_thread(self._spool.discard, token)
            self._free(token)
            if attempt.stop is Stop.CANCELLED:
                self._say_stopped(token, attempt.assign.job_id)
            elif attempt.stop is Stop.RELEASED:
                self._say(released=node_pb2.JobReleased(job_id=attempt.assign.job_id, token=token))
            return
        entry = await self._keep(attempt, complete, outputs)
        self._free(token)
        if entry is not None:
            self._spooled[token] = entry
            self._deliver(entry)

    def _free(self, token: str) -> None:
        self._running.pop(token, None)
        if not self._running:
            self._idle.set()

    async def _keep(
        self, attempt: Attempt, complete: node_pb2.JobComplete, outputs: list[tuple[Path, str]]
    ) -> SpoolEntry | None:
        """Puts an end into the spool; where its files do not fit, the end is a failure."""
        try:
            return await asyncio.to_thread(self._spool.add, complete, outputs)
        except OSError as error:
            _log.error("an end could not be spooled", job_id=attempt.assign.job_id, error=str(error))
            complete = failure(
                attempt, "DISK_FULL", f"the node's disk did not take the outputs: {error.strerror}", True
            )
        try:
            return await asyncio.to_thread(self._spool.add, complete, [])
        except OSError:
            # Not even that fits: say it once; if it is lost, the lease runs out and the job goes elsewhere.
            await asyncio.to_thread(self._spool.discard, attempt.token)
            self._say(complete=complete)
            return None

    def _deliver(self, entry: SpoolEntry) -> None:
        if self._outbox is None or self._uploader is None:
            return
        old = self._deliveries.get(entry.token)
        if old is not None and not old.done():
            old.cancel()
        task = self._spawn(self._delivery(entry, self._uploader), f"deliver {entry.token}")
        self._deliveries[entry.token] = task

    async def _delivery(self, entry: SpoolEntry, uploader: Uploader) -> None:
        """Uploads the files, then says the end. Goes on until it is said or the session is over."""
        complete = node_pb2.JobComplete()
        complete.CopyFrom(entry.complete)
        begun, pause = time.monotonic(), 0.2
        for index in range(len(entry.files)):
            while True:
                try:
                    complete.outputs[index].receipt.CopyFrom(await uploader.upload(entry, index))
                    break
                except grpc.aio.AioRpcError as error:
                    if error.code() in _FINAL:
                        _log.info("an output is not wanted any more", job_id=complete.job_id, detail=error.details())
                        self.acknowledged(entry.token)
                        return
                    await asyncio.sleep(random.uniform(0, pause))
                    pause = min(pause * 2, 10)
        complete.upload_seconds = time.monotonic() - begun
        self._say(complete=complete)

    async def _kill_later(self, attempt: Attempt) -> None:
        await asyncio.sleep(self._settings.cancel_grace_seconds)
        if self._running.get(attempt.token) is attempt:
            attempt.slot.kill()

    def _say_stopped(self, token: str, job_id: str = "") -> None:
        self._say(stopped=node_pb2.JobStopped(job_id=job_id, token=token))

    def _say(
        self,
        *,
        accepted: node_pb2.JobAccepted | None = None,
        rejected: node_pb2.JobRejected | None = None,
        started: node_pb2.JobStarted | None = None,
        complete: node_pb2.JobComplete | None = None,
        released: node_pb2.JobReleased | None = None,
        stopped: node_pb2.JobStopped | None = None,
    ) -> None:
        """Queues a control message of the session, if there is one."""
        if self._outbox is None:
            return
        self._outbox.control(
            node_pb2.AgentMessage(
                session=self._session,
                accepted=accepted,
                rejected=rejected,
                started=started,
                complete=complete,
                released=released,
                stopped=stopped,
            )
        )

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        assert self._tasks is not None
        task = self._tasks.create_task(work, name=name)
        self._own.add(task)
        task.add_done_callback(self._own.discard)
        return task
