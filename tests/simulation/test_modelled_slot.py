"""A modelled slot answers as a real slot's child does."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from fleet_agent import frames
from fleet_agent.simulation.faults import NONE, Faults
from fleet_agent.simulation.profiles import GPUS, IMAGE, MODELS, NodePlan, load_seconds
from fleet_agent.simulation.slot import ModelledSlot, Pace
from fleet_agent.slot_process import SlotCrashedError

SDXL, FLUX, TURBO = "sim-sdxl.safetensors", "sim-flux.safetensors", "sim-sdxl-turbo.safetensors"


def is_png(path: str) -> bool:
    return Path(path).read_bytes().startswith(b"\x89PNG")


class Bench:
    """A slot of a 3090 that works a thousand times as fast."""

    def __init__(self, folder: Path, faults: Faults = NONE, *, gpu: str = "rtx-3090", **plan: Any) -> None:
        self.folder = folder
        self.worked: list[tuple[str, float, float, bool]] = []
        self.plan = NodePlan("n", GPUS[gpu], tuple(MODELS.values()), **plan)
        self.slot = ModelledSlot(
            0, self.plan, Pace(1000), faults, random.Random(1), worked=lambda *what: self.worked.append(what)
        )

    def task(self, token: str, model: str = SDXL, *, loras: tuple[str, ...] = (), side: int = 512) -> frames.Message:
        return {
            "token": token,
            "job_type": IMAGE,
            "model": {"name": model},
            "loras": [{"file": {"name": name}, "weight": 1.0} for name in loras],
            "fields": {"width": side, "height": side, "steps": 20},
            "seed": "5",
            "output_folder": str(self.folder / token),
        }

    async def run(self, *task: Any, **more: Any) -> list[frames.Message]:
        return [event async for event, _ in self.slot.run(self.task(*task, **more))]


async def test_a_task_is_started_progresses_and_ends_with_a_picture(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    events = await bench.run("t1")
    assert [event["event"] for event in events][:2] == ["started", "progress"]
    done = events[-1]
    assert (done["event"], done["token"]) == ("done", "t1")
    (output,) = done["outputs"]
    assert is_png(output["path"])
    assert output["seed"] == 5
    assert done["load_seconds"] == pytest.approx(load_seconds(bench.plan, SDXL))
    assert bench.worked == [("t1", done["run_seconds"], done["load_seconds"], True)]


async def test_a_model_stays_in_memory_until_another_needs_its_room(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    await bench.run("t1")
    assert (await bench.run("t2"))[-1]["load_seconds"] == 0
    await bench.run("t3", TURBO)
    assert {loaded.name for loaded in bench.slot.loaded} == {SDXL, TURBO}
    await bench.run("t4", FLUX)
    assert {loaded.name for loaded in bench.slot.loaded} == {FLUX}
    assert (await bench.run("t5"))[-1]["load_seconds"] > 0


async def test_a_lora_is_loaded_beside_its_model(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    await bench.run("t1")
    assert (await bench.run("t2", loras=("sim-style.safetensors",)))[-1]["load_seconds"] == 0.5
    assert (await bench.run("t3", loras=("sim-style.safetensors",)))[-1]["load_seconds"] == 0
    assert bench.slot.loaded[0].loras == ("sim-style.safetensors",)


async def test_a_cancelled_task_stops_at_once(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.slot._pace = Pace(0.01)
    events = []
    async for event, _ in bench.slot.run(bench.task("t1")):
        events.append(event["event"])
        asyncio.get_running_loop().call_soon(bench.slot.cancel, "t1")
    assert events == ["started", "cancelled"]
    assert [(token, ok) for token, _, _, ok in bench.worked] == [("t1", False)]


async def test_what_does_not_fit_fails_for_want_of_memory(tmp_path: Path) -> None:
    last = (await Bench(tmp_path, gpu="rtx-3060").run("t1", FLUX))[-1]
    assert (last["event"], last["reason"]) == ("failed", "OUT_OF_MEMORY")


async def test_faults_come_as_they_are_drawn(tmp_path: Path) -> None:
    last = (await Bench(tmp_path, Faults(oom=1)).run("t1"))[-1]
    assert (last["reason"], last["retryable"]) == ("OUT_OF_MEMORY", True)
    last = (await Bench(tmp_path, failing=SDXL).run("t1"))[-1]
    assert last["reason"] == "ENGINE_FAILED"
    crashing = Bench(tmp_path, Faults(engine=1))
    with pytest.raises(SlotCrashedError):
        await crashing.run("t1")
    assert crashing.slot.loaded == ()
    assert not crashing.worked[0][3]
