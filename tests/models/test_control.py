"""Models in the memory of slots: loaded, unloaded and pinned while work goes on."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from fleet.v1 import node_pb2

from fleet_agent.engine_pool import EnginePool
from fleet_agent.engines.base import EngineError, EngineInfo, EngineResult, LoadedModel, LoraUse, ModelFile, Task
from fleet_agent.engines.sketch_model import make_checkpoint
from fleet_agent.model_control import ControlError, ModelControl, Pins
from tests.agent.conftest import probe_engine, server
from tests.agent.helpers import Agent, ScriptedServer, agent_running, assign_of, let_go, settings_of
from tests.waiting import wait_until

__all__ = ["probe_engine", "server"]


@dataclass
class OneModel:
    """An engine with room for one model."""

    name: str
    loads: list[str]
    held: str | None = None
    full: set[str] = field(default_factory=set)

    def info(self) -> EngineInfo:
        return EngineInfo(self.name, "1", ("image_gen",))

    def load(self, model: ModelFile | None, loras: tuple[LoraUse, ...] = ()) -> LoadedModel:
        assert model is not None
        if model.name in self.full:
            raise EngineError("OUT_OF_MEMORY", "full")
        if self.held != model.name:
            self.loads.append(model.name)
        self.held = model.name
        return self.loaded()[0]

    def unload(self, model: str) -> None:
        if self.held == model:
            self.held = None

    def loaded(self) -> list[LoadedModel]:
        return [] if self.held is None else [LoadedModel(self.held, 1, 0.0)]

    def estimate(self, task: Task) -> int:
        return 0

    def run(self, task: Task, report: object) -> EngineResult:
        return EngineResult()


class Pool:
    """A pool of such engines."""

    def __init__(self) -> None:
        self.loads: list[str] = []
        self.full: set[str] = set()
        self.pool = EnginePool(lambda name: OneModel(name, self.loads, full=self.full))

    def load(self, name: str, pin: bool = False) -> None:
        self.pool.load("e", file_of(name), pin=pin)

    def run(self, name: str) -> None:
        self.pool.engine("e", name).load(file_of(name))

    @property
    def loaded(self) -> dict[str, bool]:
        return {one["name"]: one["pinned"] for one in self.pool.loaded()}


def file_of(name: str) -> ModelFile:
    return ModelFile(name, None, "checkpoint")


def test_a_pinned_model_stays_whatever_else_runs() -> None:
    pool = Pool()
    pool.load("a", pin=True)
    for name in "bcb":
        pool.run(name)
        assert pool.loaded == {"a": True, name: False}
    pool.run("a")
    assert pool.loads == ["a", "b", "c", "b"], "it was never loaded again"


def test_a_model_in_memory_is_pinned_without_another_load() -> None:
    pool = Pool()
    pool.run("a")
    pool.load("a", pin=True)
    pool.load("a")
    pool.load("a", pin=True)
    assert pool.loads == ["a"] and pool.loaded == {"a": True}


def test_one_that_is_pinned_no_more_makes_room_for_the_next() -> None:
    pool = Pool()
    pool.load("a", pin=True)
    pool.run("b")
    pool.load("a")
    assert pool.loaded == {"a": False, "b": False}
    pool.run("c")
    assert pool.loaded == {"c": False}


def test_unloading_frees_it_pinned_or_not() -> None:
    pool = Pool()
    pool.load("a", pin=True)
    pool.load("b")
    pool.pool.unload("e", "a")
    pool.pool.unload("e", "a")
    assert pool.loaded == {"b": False}
    pool.pool.unload("e", "b")
    assert pool.loaded == {}


def test_a_pin_for_which_there_is_no_memory_leaves_what_was() -> None:
    pool = Pool()
    pool.run("b")
    pool.full.add("a")
    with pytest.raises(EngineError):
        pool.load("a", pin=True)
    assert pool.loaded == {"b": False}


# In real slots.


@asynccontextmanager
async def node(folder: Path, address: str = "127.0.0.1:1", slots: int = 1) -> AsyncIterator[tuple[Agent, ModelControl]]:
    for name in ("one", "two"):
        path = folder / "models" / "checkpoints" / f"{name}.safetensors"
        if not path.exists():
            make_checkpoint(path, "noir", 1, 200_000)
    # However late a task hears that it is cancelled, nothing is killed for it.
    more = {"engines": ("sketch", "probe"), "slots": slots, "cancel_grace_seconds": 50}
    settings = settings_of(folder, address, **more)
    async with agent_running(settings) as agent:
        await wait_until(lambda: agent.runner._chores is not None and all(slot.pid for slot in agent.runner.slots))
        control = ModelControl(agent.runner, agent.inventory, Pins(folder / "pins.json"), timeout_seconds=20)
        await control.open()
        yield agent, control
        await control.aclose()


def held(agent: Agent) -> dict[str, bool]:
    return {file.name: file.pinned for file in agent.runner.loaded() if file.engine == "sketch"}


async def test_models_are_loaded_pinned_and_unloaded(tmp_path: Path) -> None:
    async with node(tmp_path) as (agent, control):
        await control.load("one.safetensors", pin=True)
        await control.load("two.safetensors", pin=False)
        assert held(agent) == {"one.safetensors": True, "two.safetensors": False}
        await control.load("sketch", pin=False)
        assert held(agent) == {"one.safetensors": True, "sketch": False}
        assert ("checkpoint", "one.safetensors") in set(control.in_use())
        await control.load("one.safetensors", pin=False)
        assert held(agent) == {"one.safetensors": False, "sketch": False}
        await control.unload("one.safetensors")
        assert held(agent) == {"sketch": False}
        for call in (control.unload("one.safetensors"), control.load("three", pin=False)):
            with pytest.raises(ControlError) as refused:
                await call
            assert refused.value.reason == "MODEL_NOT_FOUND"


async def test_pins_outlive_the_slots_process_and_the_agent(tmp_path: Path) -> None:
    async with node(tmp_path) as (agent, control):
        await control.load("one.safetensors", pin=True)
        keeping = asyncio.create_task(control.run(0.02))
        pid = agent.runner.slots[0].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await wait_until(lambda: agent.runner.slots[0].pid not in (None, pid))
        await wait_until(lambda: held(agent) == {"one.safetensors": True})
        keeping.cancel()
    async with node(tmp_path) as (agent, control):
        keeping = asyncio.create_task(control.run(0.02))
        await wait_until(lambda: held(agent) == {"one.safetensors": True})
        await control.unload("one.safetensors")
        keeping.cancel()
    assert (tmp_path / "pins.json").read_text() == "[]"
    (tmp_path / "pins.json").write_text('{"no": "list"}')
    async with node(tmp_path) as (agent, control):
        assert list(control.in_use()) == []


async def test_a_load_waits_for_the_job_that_runs(server: ScriptedServer, tmp_path: Path) -> None:
    async with node(tmp_path, server.address) as (agent, control):
        talk = await server.conversation()
        talk.say(assign=assign_of("t1", "wait"))
        await talk.about("tick", "t1")
        loading = asyncio.create_task(control.load("one.safetensors", pin=True))
        await asyncio.sleep(0)
        assert held(agent) == {} and not loading.done()
        let_go(agent.settings, "t1")
        assert not (await talk.about("complete", "t1")).HasField("error")
        await loading
        assert held(agent) == {"one.safetensors": True}


async def test_a_job_waits_for_the_load_and_may_be_cancelled_meanwhile(server: ScriptedServer, tmp_path: Path) -> None:
    async with node(tmp_path, server.address) as (agent, control):
        talk = await server.conversation()
        pid = agent.runner.slots[0].pid
        (tmp_path / "slow-load").touch()
        slow = asyncio.create_task(control.load("probe", pin=True))
        await wait_until(lambda: agent.runner.slots[0].busy)
        for token in ("t2", "t3"):
            talk.say(assign=assign_of(token, "paint"))
            await talk.about("accepted", token)
            if token == "t2":
                # It waits for the load; that it is cancelled harms neither.
                talk.say(cancel=node_pb2.CancelAttempt(job_id="job-t2", token="t2"))
                await talk.about("stopped", "t2")
        (tmp_path / "slow-load").unlink()
        await slow
        assert not (await talk.about("complete", "t3")).HasField("error")
        assert agent.runner.slots[0].pid == pid, "nothing was killed"


async def test_of_two_slots_the_free_one_loads(server: ScriptedServer, tmp_path: Path) -> None:
    async with node(tmp_path, server.address, slots=2) as (agent, control):
        talk = await server.conversation()
        talk.say(assign=assign_of("t1", "wait"))
        await talk.about("tick", "t1")
        await control.load("one.safetensors", pin=True)
        assert held(agent) == {"one.safetensors": True}
        let_go(agent.settings, "t1")
        await talk.about("complete", "t1")
        await wait_until(lambda: not any(map(agent.runner.working, agent.runner.slots)))
        # Another pin goes where none is.
        await control.load("two.safetensors", pin=True)
        assert [sum(one.pinned for one in slot.loaded) for slot in agent.runner.slots] == [1, 1]


async def test_what_the_engine_cannot_do_is_told(tmp_path: Path) -> None:
    async with node(tmp_path) as (agent, control):
        (tmp_path / "no-memory").touch()
        with pytest.raises(ControlError, match="not enough") as refused:
            await control.load("probe", pin=True)
        assert refused.value.reason == "OUT_OF_MEMORY" and not (tmp_path / "pins.json").exists()
        (tmp_path / "no-memory").unlink()
        (tmp_path / "slow-load").touch()
        loading = asyncio.create_task(control.load("probe", pin=True))
        await wait_until(lambda: agent.runner.slots[0].busy)
        pid = agent.runner.slots[0].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(ControlError, match="signal 9") as refused:
            await loading
        assert refused.value.reason == "ENGINE_FAILED"
        (tmp_path / "slow-load").unlink()
        await control.load("one.safetensors", pin=False)
        assert held(agent) == {"one.safetensors": False}


async def test_an_engine_that_loads_for_ever_is_killed(tmp_path: Path) -> None:
    async with node(tmp_path) as (agent, _):
        (tmp_path / "slow-load").touch()
        control = ModelControl(agent.runner, agent.inventory, Pins(tmp_path / "pins.json"), timeout_seconds=0.2)
        with pytest.raises(ControlError, match="signal 9"):
            await control.load("probe", pin=True)
