"""Makes pictures in the slots of this machine, each an engine in a process of its own; callers wait their turn."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import uuid
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
from fleet.v1 import node_pb2, types_pb2

from fleet_agent.attempt import RefusedError, plan
from fleet_agent.inventory import Inventory
from fleet_agent.settings import AgentSettings
from fleet_agent.slot_process import SlotCrashedError, SlotProcess
from fleet_agent.slots import slots_of
from fleet_agent.worker.requests import RequestError

_log = structlog.get_logger("fleet.worker")
_STATUS = {
    "INVALID_FIELD": 400,
    "MODEL_NOT_FOUND": 404,
    "LORA_NOT_FOUND": 404,
    "DISK_FULL": 503,
}


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture and what made it."""

    data: bytes
    content_type: str
    filename: str
    seed: int


class Painter:
    """`open` asks the engines and starts the slots; `close` ends them. At most `waiting` callers wait for a slot."""

    def __init__(self, settings: AgentSettings, *, waiting: int = 64, seconds: float = 300) -> None:
        self._settings = settings
        self._inventory = Inventory(settings)
        self._waiting_limit = waiting
        self._seconds = seconds
        self._slots = slots_of(settings)
        self._free: asyncio.Queue[SlotProcess] = asyncio.Queue()
        self._waiting = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Returns when the engines have been asked; slots start meanwhile."""
        shutil.rmtree(self._folder, ignore_errors=True)
        await self._inventory.load()
        for slot in self._slots:
            self._free.put_nowait(slot)
            self._spawn(_started(slot))

    async def watch(self) -> None:
        """Keeps the list of models true, for ever."""
        await self._inventory.watch()

    async def close(self) -> None:
        """Ends the slots."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(slot.close() for slot in self._slots))

    @property
    def _folder(self) -> Path:
        return self._settings.data_dir / "worker"

    def trouble(self) -> str | None:
        """Why no picture can be made; None where one can."""
        if self._inventory.engine_for("image_gen", None) is None:
            reasons = [f"{one.name}: {one.detail}" for one in self._inventory.engines() if one.status == "failed"]
            return f"no engine makes pictures ({'; '.join(reasons) or 'none is installed'})"
        return None

    async def paint(self, payload: types_pb2.ImagePayload) -> Picture:
        """The picture. Cancelling this stops the engine. Raises RequestError."""
        token = uuid.uuid4().hex
        folder = self._folder / token
        async with self._slot() as slot:
            try:
                folder.mkdir(parents=True)
                return await self._run(slot, token, payload, folder)
            except OSError as error:
                raise RequestError(503, "DISK_FULL", f"no folder for the picture: {error.strerror}") from error
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    @asynccontextmanager
    async def _slot(self) -> AsyncIterator[SlotProcess]:
        """A slot that is free, in turn."""
        if self._free.empty() and self._waiting >= self._waiting_limit:
            raise RequestError(503, "QUEUE_FULL", f"{self._waiting} callers wait already: try again")
        self._waiting += 1
        try:
            slot = await self._free.get()
        finally:
            self._waiting -= 1
        try:
            yield slot
        finally:
            # The next begins when this one's engine has really stopped.
            self._free.put_nowait(slot)

    async def _run(self, slot: SlotProcess, token: str, payload: types_pb2.ImagePayload, folder: Path) -> Picture:
        model = payload.model or self._default_model()
        assign = node_pb2.Assign(
            job_id=token,
            token=token,
            job_type=types_pb2.JOB_TYPE_IMAGE_GEN,
            payload=types_pb2.Payload(image_gen=payload),
            model=model,
        )
        try:
            attempt = plan(assign, slot, self._inventory, folder)
        except RefusedError as error:
            raise RequestError(_STATUS.get(error.reason, 503), error.reason, str(error)) from error
        working = asyncio.create_task(_event(slot, attempt.task))
        try:
            async with asyncio.timeout(self._seconds):
                event = await asyncio.shield(working)
        except TimeoutError:
            raise RequestError(504, "TIMEOUT", f"the engine took longer than {self._seconds:g} s") from None
        except SlotCrashedError as error:
            raise RequestError(500, "ENGINE_FAILED", str(error)) from error
        finally:
            await self._stopped(slot, token, working)
        if event["event"] != "done":
            reason = event.get("reason", "ENGINE_FAILED")
            raise RequestError(_STATUS.get(reason, 500), reason, event.get("detail", "the engine stopped"))
        if not event["outputs"]:
            raise RequestError(500, "ENGINE_FAILED", "the engine made no picture")
        output = event["outputs"][0]
        path = Path(output["path"])
        data = await asyncio.to_thread(path.read_bytes)
        seed = payload.seed if output["seed"] is None else output["seed"]
        return Picture(data, output["content_type"], f"{token}{path.suffix}", seed)

    async def _stopped(self, slot: SlotProcess, token: str, working: asyncio.Task[dict[str, Any]]) -> None:
        """Sees to it that the engine has stopped, whatever became of its caller."""
        if working.done():
            return
        slot.cancel(token)
        try:
            async with asyncio.timeout(self._settings.cancel_grace_seconds):
                await asyncio.shield(asyncio.wait([working]))
        except TimeoutError:
            _log.warning("an engine does not stop and is killed")
            slot.kill()
        await asyncio.gather(working, return_exceptions=True)

    def _default_model(self) -> str:
        names = sorted(
            model.name
            for model in self._inventory.models()
            if model.kind == "checkpoint" and types_pb2.JOB_TYPE_IMAGE_GEN in model.job_types
        )
        return names[0] if names else ""

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _event(slot: SlotProcess, task: dict[str, Any]) -> dict[str, Any]:
    """The last event of a task."""
    last: dict[str, Any] = {}
    async with contextlib.aclosing(slot.run(task)) as events:
        async for event, _ in events:
            last = event
    return last


async def _started(slot: SlotProcess) -> None:
    with contextlib.suppress(SlotCrashedError):
        await slot.start()
