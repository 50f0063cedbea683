"""The work of an agent: attempts in slots, and their ends in the spool.

An attempt runs on whether or not the server can be reached. An end with files is on the disk before it is said and the
slot is free again. One without is said at once and written down meanwhile, since either is enough: once the server has
acknowledged it the disk need not have it, and before that it is held, said again, and found by the next process.
Whatever goes wrong with one attempt is the end of that attempt, never of the agent.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import structlog
from fleet.v1 import node_pb2

from fleet_agent import frames
from fleet_agent.attempt import Attempt, RefusedError, Stop, completion, failure, plan
from fleet_agent.chores import Chores
from fleet_agent.deliveries import Deliveries
from fleet_agent.disk_room import DiskRoom
from fleet_agent.engines.base import ModelKind
from fleet_agent.inputs import Downloader, InputError
from fleet_agent.inventory import Inventory
from fleet_agent.keeper import Keeper
from fleet_agent.link import Link
from fleet_agent.loaded import loaded_files
from fleet_agent.preparation import Preparation
from fleet_agent.settings import AgentSettings
from fleet_agent.slot_process import SlotCrashedError, SlotProcess
from fleet_agent.slots import slot_for, slots_of
from fleet_agent.spool import BadTokenError, Spool, SpoolEntry

_log = structlog.get_logger("fleet.agent")
_MESSAGE = 500
Said = node_pb2.AgentMessage


@dataclass(frozen=True, slots=True)
class _End:
    """How the engine's run ended: with a result or a failure, or (None) because it was told to stop."""

    complete: node_pb2.JobComplete | None
    outputs: list[tuple[Path, str]] = field(default_factory=list)


class Runner:
    """Slots of one agent. `open` starts them; its tasks belong to the group given there."""

    def __init__(self, settings: AgentSettings, inventory: Inventory, spool: Spool) -> None:
        self._settings = settings
        self._inventory = inventory
        self._spool = spool
        self.deliveries = Deliveries(settings, spool)
        self._keeper = Keeper(spool, self.deliveries, settings.capacity)
        self._slots = slots_of(settings)
        inputs = settings.data_dir / "inputs"
        self._preparation = Preparation(inputs, lambda: self.downloader)
        self._running: dict[str, Attempt] = {}
        self._taken: Counter[int] = Counter()
        """Attempts in each slot, by the slot's id()."""
        self._room = DiskRoom(settings.data_dir)
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        self._link: Link | None = None
        self._chores: Chores | None = None

    async def open(self, tasks: asyncio.TaskGroup) -> None:
        """Reads the spool and starts every slot's child; one that does not start is tried again with its first task."""
        self._chores = Chores(tasks)
        await self._preparation.open()
        await self.deliveries.open(self._chores)
        await asyncio.gather(*(_warm(slot) for slot in self._slots))

    def cancel_tasks(self) -> None:
        """Ends deliveries and watches under way; what is spooled stays spooled."""
        if self._chores is not None:
            self._chores.cancel()

    async def close(self) -> None:
        """Ends every child; call it when no attempt is running."""
        await asyncio.gather(*(slot.close() for slot in self._slots))
        await self._keeper.aclose()
        await self._spool.aclose()

    @property
    def slots_free(self) -> int:
        return sum(slot.seats for slot in self._slots) - len(self._running)

    def running(self) -> list[node_pb2.HeldAttempt]:
        """Attempts in slots."""
        return [attempt.held() for attempt in self._running.values()]

    def spooled(self) -> list[node_pb2.HeldAttempt]:
        """Attempts whose end is not yet acknowledged."""
        return self.deliveries.held()

    def loaded(self) -> list[node_pb2.LoadedFile]:
        """Models in the memory of the slots' children."""
        return loaded_files(self._slots)

    @property
    def slots(self) -> Sequence[SlotProcess]:
        return self._slots

    def working(self, slot: SlotProcess) -> bool:
        """Whether an attempt is in the slot, or its child is loading something."""
        return slot.busy or any(attempt.slot is slot for attempt in self._running.values())

    def files_in_use(self) -> Iterator[tuple[ModelKind, str]]:
        """Kind and name of each file that an attempt works with."""
        for attempt in self._running.values():
            yield from attempt.files

    @property
    def downloader(self) -> Downloader | None:
        """That of the session; None while there is none."""
        return self._link.downloader if self._link else None

    def connected(self, link: Link, kill_tokens: Iterable[str] = ()) -> None:
        """A Welcome has come: says again what matters, and delivers what is spooled."""
        self._link = link
        self.stop(kill_tokens, Stop.DROPPED)
        for attempt in self._running.values():
            if attempt.started:
                self._say(Said(started=node_pb2.JobStarted(job_id=attempt.assign.job_id, token=attempt.token)))
        self.deliveries.connected(link)

    def disconnected(self) -> None:
        """The session is over; the work goes on."""
        self._link = None
        self.deliveries.disconnected()

    def assign(self, assign: node_pb2.Assign) -> None:
        """Takes work, or says why not; an Assign that comes twice is accepted twice and runs once."""
        job_id, token = assign.job_id, assign.token
        if token in self.deliveries:
            return
        if token not in self._running:
            try:
                attempt = self._plan(assign)
            except Exception as error:
                refusal = _refusal(error)
                _log.info("work is refused", job_id=job_id, reason=refusal.reason, detail=refusal.detail)
                reason, detail = refusal.reason, refusal.detail
                self._say(Said(rejected=node_pb2.JobRejected(job_id=job_id, token=token, reason=reason, detail=detail)))
                return
            self._running[token] = attempt
            self._taken[id(attempt.slot)] += 1
            self._idle.clear()
            self._spawn_run(attempt)
        self._say(Said(accepted=node_pb2.JobAccepted(job_id=job_id, token=token)), soon=True)

    def cancel(self, job_id: str, token: str) -> None:
        """Stops an attempt on the server's word; the answer is a JobStopped, also where it is not here any more."""
        if token in self._running:
            self.stop([token], Stop.CANCELLED)
        else:
            self._say(Said(stopped=node_pb2.JobStopped(job_id=job_id, token=token)))

    def stop(self, tokens: Iterable[str], why: Stop) -> None:
        """Stops those that are running; an engine that does not stop in time is killed."""
        for token in tokens:
            attempt = self._running.get(token)
            if attempt is None:
                continue
            if attempt.stop is None:
                if attempt.preparing is not None:
                    attempt.preparing.cancel()
                attempt.slot.cancel(token)
                self._spawn_kill(attempt)
            attempt.stop = why if attempt.stop is None else max(attempt.stop, why)

    def renewed(self, tokens: Iterable[str], until: float) -> None:
        """The server has renewed the leases of these attempts; exclusive ones may run until then (monotonic)."""
        for token in tokens:
            attempt = self._running.get(token)
            if attempt is not None and attempt.lease is not None and attempt.lease.renew(until):
                attempt.slot.extend(token, until)

    async def release(self) -> None:
        """Takes no more work, stops what runs and gives it back, uncounted; returns when the slots are free."""
        self._draining = True
        self.stop(list(self._running), Stop.RELEASED)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.stop_grace_seconds + self._settings.cancel_grace_seconds):
                await self._idle.wait()

    def show_previews(self, tokens: Iterable[str]) -> None:
        """Whose pictures in the making somebody looks at."""
        wanted = set(tokens)
        for token, attempt in self._running.items():
            attempt.previews = token in wanted
            if not attempt.previews and self._link is not None:
                self._link.outbox.withdraw_preview(token)

    def _plan(self, assign: node_pb2.Assign) -> Attempt:
        if self._draining:
            raise RefusedError("DRAINING", "this agent is being shut down")
        taken = self._taken
        free = [slot for slot in self._slots if taken[id(slot)] < slot.seats]
        if not free:
            raise RefusedError("SLOTS_FULL", "every slot of this node is taken")
        try:
            room = self._room.free()
            if room < self._settings.disk_floor_bytes:
                floor = self._settings.disk_floor_bytes
                raise RefusedError("DISK_FULL", f"{room:,} bytes are free on this node, less than {floor:,}")
            folder = self._spool.work_folder(assign.token)
        except BadTokenError as error:
            raise RefusedError("CAPABILITY_MISSING", str(error)) from error
        except OSError as error:
            raise RefusedError("DISK_FULL", f"no folder for the outputs: {error.strerror}") from error
        try:
            slot, most = slot_for(assign.model, free), self._settings.inline_bytes
            return plan(assign, slot, self._inventory, folder, inline_bytes=most)
        except BaseException:
            self._spool.discard(assign.token)
            raise

    async def _run(self, attempt: Attempt) -> None:
        """Runs an attempt to its end; the slot is free when its end is on the disk, or without files, being said."""
        said: Said | None = None
        entry: SpoolEntry | None = None
        try:
            said, entry = await self._settle(attempt, await self._work(attempt))
        except Exception as error:
            _log.exception("the end of an attempt could not be kept", job_id=attempt.assign.job_id)
            said = Said(complete=failure(attempt, "ENGINE_FAILED", f"the agent failed: {error!r}", True))
        finally:
            if self._running.pop(attempt.token, None) is not None:
                self._taken[id(attempt.slot)] -= 1
            if not self._running:
                self._idle.set()
        if entry is not None:
            self.deliveries.add(entry)
            if not entry.files:
                self._keeper.keep_meanwhile(entry)
        if said is not None:
            self._say(said)
        if attempt.slot.pid is None and not self._draining:
            self._spawn_warm(attempt.slot)

    async def _work(self, attempt: Attempt) -> _End:
        """Lets the engine work. Whatever it does, the answer is an end."""
        seconds, token = attempt.assign.timeout_seconds, attempt.token
        loop = asyncio.get_running_loop()
        timeout = loop.call_later(seconds, self.stop, [token], Stop.TIMEOUT) if seconds > 0 else None
        try:
            await self._preparation.prepare(attempt, lambda: self._lease_ended(attempt))
            if attempt.stop is not None:
                return _End(None)
            async with contextlib.aclosing(attempt.slot.run(attempt.task)) as events:
                async for event, blob in events:
                    if event["event"] in ("done", "failed"):
                        apart = [out for out in event.get("outputs", ()) if "inline" not in out]
                        outputs = [(Path(out["path"]), out["content_type"]) for out in apart]
                        return _End(completion(attempt, event, blob), outputs)
                    if event["event"] == "cancelled":
                        break
                    self._heard(attempt, event, blob)
        except InputError as error:
            return _End(failure(attempt, error.reason, error.detail, error.retryable))
        except SlotCrashedError as crash:
            if attempt.lease is not None and attempt.lease.lost:
                self._lease_ended(attempt)
                return _End(None)
            return _End(failure(attempt, crash.reason, str(crash), True))
        except Exception as error:
            _log.exception("an engine's process does not keep to the protocol", job_id=attempt.assign.job_id)
            attempt.slot.kill()
            detail = f"the engine's process said what makes no sense: {error!r}"
            return _End(failure(attempt, "ENGINE_FAILED", detail, True))
        finally:
            if timeout is not None:
                timeout.cancel()
            await self._preparation.clean(attempt)
        if attempt.stop is None:
            return _End(failure(attempt, "ENGINE_FAILED", "the engine stopped without having been told to", True))
        return _End(None)

    def _lease_ended(self, attempt: Attempt) -> None:
        """Exclusive work whose lease may be another's soon: ended at once, without a word."""
        _log.warning("exclusive work is ended: its lease was not renewed", job_id=attempt.assign.job_id)
        if attempt.preparing is not None:
            attempt.preparing.cancel()
        attempt.stop = max(attempt.stop or Stop.DROPPED, Stop.DROPPED)
        attempt.slot.kill()

    def _heard(self, attempt: Attempt, event: frames.Message, blob: bytes) -> None:
        job_id, token = attempt.assign.job_id, attempt.token
        if event["event"] == "started":
            attempt.started = True
            self._say(Said(started=node_pb2.JobStarted(job_id=job_id, token=token)), soon=True)
        elif event["event"] == "progress":
            attempt.step, attempt.steps = event["step"], event["steps"]
            if self._link is not None:
                held, message = attempt.held(), event["message"]
                tick = node_pb2.JobTick(job_id=job_id, token=token, progress=held.progress)
                tick.step, tick.steps = attempt.step, attempt.steps
                if message is not None:
                    tick.message = message[:_MESSAGE]
                self._link.tick(tick)
        elif event["event"] == "text" and self._link is not None:
            tick = node_pb2.JobTick(job_id=job_id, token=token, progress=attempt.progress)
            if attempt.steps:
                tick.step, tick.steps = attempt.step, attempt.steps
            tick.text, tick.text_offset = event["text"], event["offset"]
            self._link.tick(tick)
        elif event["event"] == "frame" and self._link is not None:
            frame = node_pb2.EngineFrame(job_id=job_id, token=token)
            if event["text"] is None:
                frame.binary = blob
            else:
                frame.text = event["text"]
            self._link.outbox.frame(Said(session=self._link.session, frame=frame))
        elif event["event"] == "preview" and attempt.previews and self._link is not None:
            preview = node_pb2.JobPreview(job_id=job_id, token=token, progress=attempt.progress)
            if attempt.steps:
                preview.step, preview.steps = attempt.step, attempt.steps
            preview.preview.content_type, preview.preview.data = event["content_type"], blob
            self._link.preview(preview)

    async def _settle(self, attempt: Attempt, end: _End) -> tuple[Said | None, SpoolEntry | None]:
        """What to say of an end once the slot is free, and what to deliver."""
        job_id, token, complete = attempt.assign.job_id, attempt.token, end.complete
        if self._link is not None:
            self._link.outbox.finish(token)
        if attempt.stop is Stop.TIMEOUT and (complete is None or complete.HasField("error")):
            seconds = attempt.assign.timeout_seconds
            complete = failure(attempt, "TIMEOUT", f"the attempt ran longer than its {seconds:g} seconds", True)
        if complete is None or _given_up(attempt, complete):
            await asyncio.to_thread(self._spool.discard, token)
            return _parting(attempt), None
        entry = await self._keeper.keep(attempt, complete, end.outputs)
        if attempt.stop is Stop.CANCELLED:
            # The server's word came while the end was being written: it is not wanted any more.
            self.deliveries.abandon(token)
            await asyncio.to_thread(self._spool.remove, token)
            return Said(stopped=node_pb2.JobStopped(job_id=job_id, token=token)), None
        return None, entry

    async def _kill_later(self, attempt: Attempt) -> None:
        await asyncio.sleep(self._settings.cancel_grace_seconds + attempt.stop_seconds)
        if self._running.get(attempt.token) is attempt:
            _log.warning("an engine does not stop and is killed", job_id=attempt.assign.job_id)
            attempt.slot.kill()

    def _spawn_run(self, attempt: Attempt) -> None:
        assert self._chores is not None
        self._chores.spawn(self._run(attempt), f"attempt {attempt.token}")

    def _spawn_kill(self, attempt: Attempt) -> None:
        assert self._chores is not None
        self._chores.spawn(self._kill_later(attempt), f"stop {attempt.token}")

    def _spawn_warm(self, slot: SlotProcess) -> None:
        assert self._chores is not None
        self._chores.spawn(_warm(slot), "start a slot again")

    def _say(self, message: Said, *, soon: bool = False) -> None:
        """Queues a control message of the session, if there is one."""
        if self._link is not None:
            self._link.say(message, soon=soon)


def _refusal(error: Exception) -> RefusedError:
    if isinstance(error, RefusedError):
        return error
    _log.error("work makes no sense", error=repr(error))
    return RefusedError("CAPABILITY_MISSING", f"this agent does not understand the work: {error!r}"[:500])


def _given_up(attempt: Attempt, complete: node_pb2.JobComplete) -> bool:
    """Nobody waits for this end; a success that came before its release was heard is kept."""
    if attempt.stop is Stop.RELEASED:
        return complete.HasField("error")
    return attempt.stop in (Stop.CANCELLED, Stop.DROPPED)


def _parting(attempt: Attempt) -> Said | None:
    """What the server hears of an attempt that was stopped."""
    job_id, token = attempt.assign.job_id, attempt.token
    if attempt.stop is Stop.CANCELLED:
        return Said(stopped=node_pb2.JobStopped(job_id=job_id, token=token))
    if attempt.stop is Stop.RELEASED:
        return Said(released=node_pb2.JobReleased(job_id=job_id, token=token))
    return None


async def _warm(slot: SlotProcess) -> None:
    """Starts a slot's child ahead of its task; where that fails, the task tries again and says why."""
    with contextlib.suppress(SlotCrashedError):
        await slot.start()
