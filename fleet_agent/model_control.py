"""Loads, unloads and pins models in the slots' processes, beside the work that they do."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import uuid
from collections.abc import Iterable
from pathlib import Path

import structlog

from fleet_agent import frames
from fleet_agent.engines.base import ModelFile
from fleet_agent.inventory import Inventory, model_fields
from fleet_agent.model_shelf import FileKey
from fleet_agent.runner import Runner
from fleet_agent.slot_process import SlotCrashedError, SlotProcess

_log = structlog.get_logger("fleet.agent.models")


class ControlError(Exception):
    """A model was not loaded; `reason` is one of the API's words."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


class Pins:
    """Names of pinned models, in a file: they are pinned again after a restart."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._names: frozenset[str] = frozenset()

    def open(self) -> None:
        """Reads the file; one that makes no sense is no pins. Blocks."""
        with contextlib.suppress(OSError, ValueError):
            raw = json.loads(self._path.read_bytes())
            if isinstance(raw, list):
                self._names = frozenset(name for name in raw if isinstance(name, str))

    @property
    def names(self) -> frozenset[str]:
        return self._names

    async def set(self, name: str, pinned: bool) -> None:
        """Raises OSError."""
        names = self._names | {name} if pinned else self._names - {name}
        if names != self._names:
            await asyncio.to_thread(self._write, sorted(names))
            self._names = names

    def _write(self, names: list[str]) -> None:
        aside = self._path.with_suffix(".new")
        with aside.open("w") as file:
            json.dump(names, file)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(self._path)


class ModelControl:
    """`open`, then `run` is one task that keeps pinned models in memory; `aclose` in the end."""

    def __init__(self, runner: Runner, inventory: Inventory, pins: Pins, *, timeout_seconds: float) -> None:
        self._runner = runner
        self._inventory = inventory
        self._pins = pins
        self._timeout = timeout_seconds
        self._asking: set[asyncio.Task[frames.Message]] = set()
        self._failed: dict[str, str] = {}

    async def open(self) -> None:
        """Reads the pins."""
        await asyncio.to_thread(self._pins.open)

    async def aclose(self) -> None:
        """Waits for nothing: the processes are about to be ended."""
        for task in self._asking:
            task.cancel()
        await asyncio.gather(*self._asking, return_exceptions=True)

    def in_use(self) -> Iterable[FileKey]:
        """Files that must stay: in memory, wanted by work, pinned."""
        for slot in self._runner.slots:
            for model in slot.loaded:
                yield "checkpoint", model.name
                for lora in model.loras:
                    yield "lora", lora
        yield from self._runner.files_in_use()
        for name in self._pins.names:
            yield "checkpoint", name

    async def load(self, name: str, *, pin: bool) -> None:
        """The model is in memory, pinned or not. Where every slot is at work it waits for one.

        Raises ControlError: MODEL_NOT_FOUND, OUT_OF_MEMORY, ENGINE_FAILED, DISK_FULL (the pin cannot be kept).
        """
        file = self._inventory.file("checkpoint", name)
        engine = None if file is None else self._inventory.engine_of(file)
        if file is None or engine is None:
            raise ControlError("MODEL_NOT_FOUND", f"this node has no model {name!r} that an engine of it loads")
        slot = self._slot_for(name, pin)
        if not self._holds(slot, name, pin):
            await self._ask(slot, "load", engine, file, pin)
        try:
            await self._pins.set(name, pin)
        except OSError as error:
            raise ControlError("DISK_FULL", f"the pin cannot be written down: {error.strerror}") from error

    async def unload(self, name: str) -> None:
        """The model is in no slot's memory and no pin. Raises ControlError MODEL_NOT_FOUND where it was in none."""
        holding = [(slot, model) for slot in self._runner.slots for model in slot.loaded if model.name == name]
        if not holding and name not in self._pins.names:
            raise ControlError("MODEL_NOT_FOUND", f"the model {name!r} is not in this node's memory")
        with contextlib.suppress(OSError):
            await self._pins.set(name, False)
        for slot, model in holding:
            await self._ask(slot, "unload", model.engine, ModelFile(name, None, "checkpoint"), False)

    async def run(self, pause_seconds: float) -> None:
        """Loads pinned models again whose process has ended, until cancelled."""
        while True:
            for name in sorted(self._pins.names):
                if not any(self._holds(slot, name, True) for slot in self._runner.slots):
                    await self._again(name)
            await asyncio.sleep(pause_seconds)

    async def _again(self, name: str) -> None:
        try:
            await self.load(name, pin=True)
        except ControlError as error:
            if self._failed.get(name) != error.detail:
                _log.warning("a pinned model is not in memory", name=name, reason=error.reason, detail=error.detail)
            self._failed[name] = error.detail
        else:
            self._failed.pop(name, None)

    def _slot_for(self, name: str, pin: bool) -> SlotProcess:
        """One that has the model, else one that is free, with the fewest pins."""
        slots = self._runner.slots
        holding = [slot for slot in slots if any(model.name == name for model in slot.loaded)]
        if holding:
            return next((slot for slot in holding if self._holds(slot, name, pin)), holding[0])
        return min(slots, key=lambda slot: (self._runner.working(slot), sum(one.pinned for one in slot.loaded)))

    @staticmethod
    def _holds(slot: SlotProcess, name: str, pin: bool) -> bool:
        return any(model.name == name and model.pinned is pin for model in slot.loaded)

    async def _ask(self, slot: SlotProcess, what: str, engine: str, file: ModelFile, pin: bool) -> None:
        message = {"do": what, "token": uuid.uuid4().hex, "engine": engine, "model": model_fields(file), "pin": pin}
        # The process goes on whoever waits: what it is asked must be heard to its end.
        task = asyncio.create_task(self._asked(slot, message), name=f"{what} {file.name}")
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)
        try:
            reply = await asyncio.shield(task)
        except (SlotCrashedError, frames.BadFrameError) as error:
            raise ControlError("ENGINE_FAILED", str(error)) from error
        if reply["event"] != "done":
            raise ControlError(reply["reason"], reply["detail"])

    async def _asked(self, slot: SlotProcess, message: frames.Message) -> frames.Message:
        handle: list[asyncio.TimerHandle] = []
        loop = asyncio.get_running_loop()

        def begun() -> None:
            handle.append(loop.call_later(self._timeout, slot.kill))

        try:
            return await slot.ask(message, begun)
        finally:
            for timer in handle:
                timer.cancel()
