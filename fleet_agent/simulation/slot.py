"""A modelled engine slot: it takes a task as the real slot's child does, and answers with the same frames, in time.

Nothing is computed: loading and running are waits of the lengths that the profile's figures give.
"""

from __future__ import annotations

import asyncio
import random
import struct
import zlib
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fleet_agent import frames
from fleet_agent.simulation.faults import Faults
from fleet_agent.simulation.profiles import GIB, IMAGE, LLM, MODELS, NodePlan, load_seconds, run_seconds
from fleet_agent.slot_process import Loaded, SlotCrashedError, SlotProcess

ENGINE = "simulated"
TICK_SECONDS = 0.5
_LORA_SECONDS = 0.5
_PIXEL_BYTES = 1_200
"""Memory beyond the model's that a pixel takes while it is worked on."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How modelled time becomes real: `speed` 10 runs ten times as fast. `outputs`: pictures are sent as tiny files."""

    speed: float = 1.0
    outputs: bool = True


class ModelledSlot(SlotProcess):
    """One slot of a modelled GPU. `worked(token, running, loading, succeeded)` is told of each
    attempt, in modelled seconds."""

    def __init__(
        self,
        index: int,
        plan: NodePlan,
        pace: Pace,
        faults: Faults,
        rng: random.Random,
        *,
        worked: Callable[[str, float, float, bool], None],
    ) -> None:
        super().__init__(index, Path(), Path())
        self._plan = plan
        self._pace = pace
        self._faults = faults
        self._rng = rng
        self._worked = worked
        self._memory: dict[str, Loaded] = {}
        self._token: str | None = None
        self._stopped = asyncio.Event()

    @property
    def pid(self) -> int | None:
        """It has no process; it is always up."""
        return 0

    @property
    def loaded(self) -> tuple[Loaded, ...]:
        return tuple(self._memory.values())

    async def start(self) -> None:
        """Nothing to start."""

    async def close(self) -> None:
        """Nothing to end."""

    def kill(self) -> None:
        """Stops the task at once; models in memory are gone, as with a process."""
        self._memory.clear()
        self._stopped.set()

    def cancel(self, token: str) -> None:
        """Stops the task at its next step."""
        if token == self._token:
            self._stopped.set()

    async def run(self, message: frames.Message) -> AsyncGenerator[tuple[frames.Message, bytes], None]:
        """Yields the frames of one task. Raises SlotCrashedError where the faults say so."""
        token = self._token = message["token"]
        self._stopped.clear()
        try:
            yield {"event": "started", "token": token}, b""
            fate = self._fate(message)
            model = message["model"]["name"] if message["model"] is not None else ""
            loading = await self._load(message, model)
            seconds = 0.0 if loading is None or fate in ("oom", "failing") else self._seconds(message, model)
            if fate == "engine":
                seconds *= self._rng.random()
            steps = int(message["fields"].get("steps", 1))
            done = 0.0
            while loading is not None and done < seconds and not self._stopped.is_set():
                # A tick each half second, and not more than there are steps.
                part = min(max(TICK_SECONDS * self._pace.speed, seconds / steps), seconds - done)
                await self._wait(part)
                done += part
                step = int(steps * done / seconds)
                yield {"event": "progress", "token": token, "step": step, "steps": steps, "message": None}, b""
            succeeded = fate is None and not self._stopped.is_set()
            self._worked(token, done, loading or 0.0, succeeded)
            if self._stopped.is_set():
                last: frames.Message = {"event": "cancelled"}
            elif fate == "engine":
                self._memory.clear()
                raise SlotCrashedError("the modelled engine's process was ended by a fault of the simulation")
            elif fate is not None:
                last = _failure(fate, model)
            else:
                last = self._result(message, loading or 0.0, done)
            yield {**last, "token": token}, b""
        finally:
            self._token = None

    def _fate(self, message: frames.Message) -> Literal["oom", "engine", "failing"] | None:
        """How this attempt will fail, None where it will not."""
        model = message["model"]
        if model is not None and model["name"] == self._plan.failing:
            return "failing"
        drawn = self._rng.random()
        if drawn < self._faults.engine:
            return "engine"
        if drawn < self._faults.engine + self._faults.oom or self._too_large(message):
            return "oom"
        return None

    def _too_large(self, message: frames.Message) -> bool:
        if message["job_type"] != IMAGE or message["model"] is None:
            return False
        spec = MODELS.get(message["model"]["name"])
        fields = message["fields"]
        pixels = int(fields.get("width", 0)) * int(fields.get("height", 0))
        need = (spec.memory_gib * GIB if spec is not None else 0) + pixels * _PIXEL_BYTES
        return need > self._plan.gpu.memory_gib * GIB

    async def _load(self, message: frames.Message, model: str) -> float | None:
        """Brings the model and LoRAs into memory; the modelled seconds, None where it was stopped meanwhile."""
        if not model:
            return 0.0
        loop = asyncio.get_running_loop()
        loras = tuple(use["file"]["name"] for use in message["loras"])
        before = self._memory.get(model)
        seconds = 0.0 if before is not None else load_seconds(self._plan, model)
        known = before.loras if before is not None else ()
        seconds += _LORA_SECONDS * sum(1 for name in loras if name not in known)
        if before is None:
            self._make_room(model)
        await self._wait(seconds)
        if self._stopped.is_set():
            return None
        now = loop.time()
        size = int(MODELS[model].memory_gib * GIB) if model in MODELS else 0
        loaded_at = before.loaded_at if before is not None else now
        self._memory[model] = Loaded(ENGINE, model, size, loras or known, loaded_at, now)
        return seconds

    def _make_room(self, model: str) -> None:
        """Drops what was used longest ago until the model fits into this slot's part of the memory."""
        room = self._plan.gpu.memory_gib / self._plan.gpu.slots
        need = MODELS[model].memory_gib if model in MODELS else 0.0
        held = sorted(self._memory.values(), key=lambda loaded: loaded.used_at)
        while held and need + sum(loaded.memory_bytes for loaded in held) / GIB > room:
            del self._memory[held.pop(0).name]

    def _seconds(self, message: frames.Message, model: str) -> float:
        fields = message["fields"]
        if message["job_type"] == IMAGE:
            size = float(fields.get("width", 0)) * float(fields.get("height", 0)) * float(fields.get("steps", 1))
        elif message["job_type"] == LLM:
            size = float(fields.get("max_tokens", 1))
        else:
            seconds = fields.get("seconds", 1.0)
            size = float(seconds) if isinstance(seconds, int | float) else 1.0
        return max(run_seconds(self._plan, message["job_type"], model, size) * self._rng.uniform(0.95, 1.05), 1e-6)

    def _result(self, message: frames.Message, loading: float, running: float) -> frames.Message:
        outputs: list[dict[str, Any]] = []
        picture = message["job_type"] == IMAGE and self._pace.outputs
        if picture:
            folder = Path(message["output_folder"])
            # A few hundred bytes: not worth a thread's time.
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / "picture.png"
            path.write_bytes(tiny_picture(self._rng.randbytes(3)))
            fields = message["fields"]
            outputs.append(
                {
                    "path": str(path),
                    "content_type": "image/png",
                    "width": int(fields.get("width", 0)),
                    "height": int(fields.get("height", 0)),
                    "duration_seconds": None,
                    "seed": int(message["seed"]),
                }
            )
        return {
            "event": "done",
            "outputs": outputs,
            "text": None if picture else f"simulated by {self._plan.node_id}",
            "finish_reason": None,
            "segments": [],
            "usage": None,
            "exit_code": None,
            "record_json": None,
            "load_seconds": loading,
            "run_seconds": running,
        }

    async def _wait(self, seconds: float) -> None:
        """Waits modelled seconds, or until the task is stopped."""
        if seconds <= 0:
            return
        try:
            async with asyncio.timeout(seconds / self._pace.speed):
                await self._stopped.wait()
        except TimeoutError:
            return


def _failure(fate: str, model: str) -> frames.Message:
    if fate == "oom":
        reason, detail = "OUT_OF_MEMORY", "the modelled GPU ran out of memory"
    else:
        reason, detail = "ENGINE_FAILED", f"{model} fails on this node, by the faults of the simulation"
    return {"event": "failed", "reason": reason, "detail": detail, "retryable": True}


def tiny_picture(colour: bytes) -> bytes:
    """A PNG of one pixel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" + colour)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts
