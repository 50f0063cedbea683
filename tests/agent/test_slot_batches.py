"""Tasks that a slot runs together: which ones, and what becomes of each."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fleet_agent import frames
from fleet_agent.engines import registry
from fleet_agent.engines.base import EngineSettings
from fleet_agent.gatherer import Gatherer
from fleet_agent.inbox import Inbox
from fleet_agent.loaded import loaded_files
from fleet_agent.slot import Child
from fleet_agent.slot_process import Loaded, SlotCrashedError, SlotProcess
from tests.agent.plugins.fleet_choir import ChoirEngine
from tests.agent.test_slot_process import Events, run, task_of, words
from tests.waiting import wait_until, wait_until_now

WAIT_SECONDS = 1.0
"""Long enough that a busy machine makes no other batches; a full one does not wait."""


@pytest.fixture
async def slot(tmp_path: Path) -> AsyncIterator[SlotProcess]:
    slot = SlotProcess(0, tmp_path / "models", tmp_path, seats=4, batch_wait_seconds=WAIT_SECONDS)
    try:
        yield slot
    finally:
        await slot.close()


def song(folder: Path, number: int, prompt: str = "sing", **fields: Any) -> Any:
    task = task_of(folder, prompt, token=f"t{number}", engine="choir", **fields)
    return {**task, "seed": str(number)}


async def together(slot: SlotProcess, *tasks: Any) -> list[Events | BaseException]:
    return await asyncio.gather(*(run(slot, task) for task in tasks), return_exceptions=True)


def batches(folder: Path) -> list[set[str]]:
    return [set(json.loads(line)) for line in (folder / "batches").read_text().splitlines()]


def last(events: Events | BaseException) -> frames.Message:
    assert isinstance(events, list)
    return events[-1][0]


async def test_like_tasks_run_together_and_each_has_its_own_end(slot: SlotProcess, tmp_path: Path) -> None:
    ends = await together(slot, *(song(tmp_path, number) for number in (1, 2, 3)))
    assert batches(tmp_path) == [{"job-t1", "job-t2", "job-t3"}]
    for number, events in enumerate(ends, 1):
        assert isinstance(events, list)
        assert words(events) == ["started", "progress", "done"]
        (output,) = last(events)["outputs"]
        assert (output["seed"], (tmp_path / f"out-t{number}" / "song.png").read_text()) == (number, str(number))
    [model] = slot.loaded
    assert (model.engine, model.name, model.pixel_steps_per_second) == ("choir", "choir", 50.0)
    assert not slot.busy


def test_a_model_in_two_slots_is_as_fast_as_where_it_is_slowest() -> None:
    def slot(speed: float | None) -> Any:
        return SimpleNamespace(loaded=(Loaded("choir", "m", 10, (), 1.0, 2.0, pixel_steps_per_second=speed),))

    [both] = loaded_files([slot(None), slot(70.0), slot(50.0), slot(60.0)])
    assert (both.pixel_steps_per_second, both.memory_bytes) == (50.0, 40)
    [unknown] = loaded_files([slot(None)])
    assert not unknown.HasField("pixel_steps_per_second")


async def test_others_come_after_them(slot: SlotProcess, tmp_path: Path) -> None:
    """A fourth is beyond the engine's limit, or of another key: it waits for the next batch and is not lost."""
    tasks = [
        song(tmp_path, 1, steps=1),
        song(tmp_path, 2, steps=2),
        song(tmp_path, 3, steps=1),
        song(tmp_path, 4, steps=1),
    ]
    ends = await together(slot, *tasks)
    assert [last(events)["event"] for events in ends] == ["done"] * 4
    assert batches(tmp_path) == [{"job-t1", "job-t3", "job-t4"}, {"job-t2"}]


async def test_one_is_cancelled_and_the_others_end_as_they_would(slot: SlotProcess, tmp_path: Path) -> None:
    events: Events = []
    waiting = asyncio.create_task(run(slot, song(tmp_path, 1, "wait"), events))
    others = asyncio.create_task(together(slot, song(tmp_path, 2), song(tmp_path, 3, "fail")))
    ends = await others
    assert [last(one)["event"] for one in ends] == ["done", "failed"]
    assert last(ends[1])["detail"] == "prompt: cannot be sung"
    assert not waiting.done()
    slot.cancel("t1")
    assert words(await waiting)[-1] == "cancelled"
    assert slot.pid is not None


async def test_an_engine_that_forgets_one_fails_that_one_alone(slot: SlotProcess, tmp_path: Path) -> None:
    ends = await together(slot, song(tmp_path, 1), song(tmp_path, 2, "forgotten"), song(tmp_path, 3))
    assert [last(one)["event"] for one in ends] == ["done", "failed", "done"]
    assert (last(ends[1])["reason"], last(ends[1])["retryable"]) == ("ENGINE_FAILED", True)


async def test_a_bug_fails_those_that_had_no_end_yet(slot: SlotProcess, tmp_path: Path) -> None:
    ends = await together(slot, song(tmp_path, 1, "die"), song(tmp_path, 2), song(tmp_path, 3))
    assert "failed" in [last(one)["event"] for one in ends]
    assert all(last(one)["event"] == "done" or "falls silent" in last(one)["detail"] for one in ends)
    assert words(await run(slot, {**song(tmp_path, 9), "lease_until": time.monotonic() + 60}))[-1] == "done"


async def test_a_task_that_makes_no_sense_runs_alone_and_says_so(slot: SlotProcess, tmp_path: Path) -> None:
    ends = await together(slot, song(tmp_path, 1, "unclear"), *(song(tmp_path, number) for number in (2, 3, 4)))
    assert last(ends[0])["detail"] == "prompt: cannot be sung"
    assert {"job-t1"} in batches(tmp_path)
    assert [last(one)["event"] for one in ends[1:]] == ["done"] * 3


async def test_exclusive_work_runs_alone(slot: SlotProcess, tmp_path: Path) -> None:
    """Its process ends with its lease: nobody else may be in it."""
    exclusive = {**song(tmp_path, 1), "lease_until": time.monotonic() + 60}
    ends = await together(slot, exclusive, *(song(tmp_path, number) for number in (2, 3, 4)))
    assert [last(one)["event"] for one in ends] == ["done"] * 4
    assert {"job-t1"} in batches(tmp_path)
    assert {"job-t2", "job-t3", "job-t4"} in batches(tmp_path)


async def test_a_child_that_dies_takes_its_whole_batch_and_counts_as_one_crash(
    slot: SlotProcess, tmp_path: Path
) -> None:
    work = [asyncio.create_task(run(slot, song(tmp_path, number, "wait"))) for number in (1, 2, 3)]
    await wait_until((tmp_path / "batches").exists)
    assert slot.pid is not None
    os.kill(slot.pid, signal.SIGKILL)
    for one in await asyncio.gather(*work, return_exceptions=True):
        assert isinstance(one, SlotCrashedError)
    # The pause before the next start grows with crashes, not with tasks.
    assert slot._crashes == 1
    ends = await together(slot, *(song(tmp_path, number) for number in (4, 5, 6)))
    assert [last(one)["event"] for one in ends] == ["done"] * 3


async def test_a_fifth_waits_for_a_seat(slot: SlotProcess, tmp_path: Path) -> None:
    waiting = [asyncio.create_task(run(slot, song(tmp_path, number, "wait", steps=1))) for number in (1, 2, 3)]
    await wait_until((tmp_path / "batches").exists)
    fourth = asyncio.create_task(run(slot, song(tmp_path, 4, "wait", steps=1)))
    fifth = asyncio.create_task(run(slot, song(tmp_path, 5, steps=2)))
    # Both have begun to wait, one in the child and one for a seat there.
    await wait_until(lambda: {"t4", "t5"} <= set(slot._cancelled))
    slot.cancel("t5")
    assert words(await fifth) == ["cancelled"]
    for number in (1, 2, 3, 4):
        slot.cancel(f"t{number}")
    for one in (*waiting, fourth):
        assert words(await one)[-1] == "cancelled"


def gathered(folder: Path, *messages: frames.Message, most: int = 3) -> Iterator[list[str]]:
    """What is run together of those that wait, as long as there is any; the choir sings three at once."""
    work: queue.SimpleQueue[frames.Message] = queue.SimpleQueue()
    for message in messages:
        work.put({"do": "run", **message})
    engine = ChoirEngine(EngineSettings(folder, folder))
    gatherer, left = Gatherer(work, lambda name, model: engine, most, 0.0), len(messages)
    while left:
        batch = [str(message["token"]) for message in gatherer.next()]
        left -= len(batch)
        yield batch


def test_what_loads_a_model_keeps_its_place(tmp_path: Path) -> None:
    """A task behind it does not overtake it, and none is lost."""
    order = gathered(
        tmp_path,
        song(tmp_path, 1, steps=1),
        song(tmp_path, 2, steps=2),
        {"do": "load", "token": "c"},
        song(tmp_path, 3, steps=1),
        song(tmp_path, 4, steps=2),
    )
    assert list(order) == [["t1"], ["t2"], ["c"], ["t3"], ["t4"]]


def test_what_was_put_off_behind_a_load_stays_behind_it(tmp_path: Path) -> None:
    """Also where the first batch saw all of them, and had no room."""
    work: queue.SimpleQueue[frames.Message] = queue.SimpleQueue()
    engine = ChoirEngine(EngineSettings(tmp_path, tmp_path))
    gatherer = Gatherer(work, lambda name, model: engine, 3, 0.0)
    other, load = song(tmp_path, 2, steps=2), {"do": "load", "token": "c"}
    for message in ({"do": "run", **song(tmp_path, 1, steps=1)}, {"do": "run", **other}, load):
        work.put(message)
    assert [one["token"] for one in gatherer.next()] == ["t1"]
    work.put({"do": "run", **song(tmp_path, 3, steps=2)})
    # The load waits in line: nothing is taken from behind it.
    assert [one["token"] for one in gatherer.next()] == ["t2"]
    assert [one["token"] for one in gatherer.next()] == ["c"]
    assert [one["token"] for one in gatherer.next()] == ["t3"]


def test_an_engine_is_given_no_more_than_it_can_take(tmp_path: Path) -> None:
    tasks = [song(tmp_path, number) for number in range(1, 6)]
    assert list(gathered(tmp_path, *tasks, most=8)) == [["t1", "t2", "t3"], ["t4", "t5"]]
    assert list(gathered(tmp_path, *tasks, most=2)) == [["t1", "t2"], ["t3", "t4"], ["t5"]]
    assert list(gathered(tmp_path, *tasks[:2], most=1)) == [["t1"], ["t2"]]


def test_those_that_do_not_join_keep_their_order(tmp_path: Path) -> None:
    keys = [1, 2, 3, 4, 2, 3]
    tasks = [song(tmp_path, number, steps=key) for number, key in enumerate(keys, 1)]
    assert list(gathered(tmp_path, *tasks)) == [["t1"], ["t2", "t5"], ["t3", "t6"], ["t4"]]


def test_no_exclusive_work_joins_others(tmp_path: Path) -> None:
    tasks = [song(tmp_path, number) for number in (1, 2, 3)]
    tasks[1]["lease_until"] = 1.0
    assert list(gathered(tmp_path, *tasks)) == [["t1", "t3"], ["t2"]]


def test_other_models_and_loras_are_other_batches(tmp_path: Path) -> None:
    tasks = [song(tmp_path, number) for number in (1, 2, 3, 4)]
    tasks[1]["model"] = {"name": "m", "path": None, "kind": "checkpoint", "size_bytes": 0, "trigger_words": []}
    tasks[2]["loras"] = [{"file": tasks[1]["model"], "weight": 0.5}]
    tasks[3]["loras"] = [{"file": tasks[1]["model"], "weight": 0.7}]
    assert list(gathered(tmp_path, *tasks)) == [["t1"], ["t2"], ["t3"], ["t4"]]


def test_each_end_is_said_once_and_nothing_of_it_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "create", lambda name, settings: ChoirEngine(settings))
    said: list[frames.Message] = []
    pipe: Any = SimpleNamespace(send=lambda message, blob=b"": said.append(message))
    child = Child(EngineSettings(tmp_path, tmp_path), pipe, 4, 0.0)
    for number in (1, 2, 3, 4):
        child._hear({"do": "run", **song(tmp_path, number, "fail" if number == 2 else "sing")})
    threading.Thread(target=child.work, daemon=True).start()

    def ends() -> list[str]:
        return [message["token"] for message in said if message["event"] in ("done", "failed")]

    wait_until_now(lambda: "t4" in ends())
    assert sorted(ends()) == ["t1", "t2", "t3", "t4"]
    assert child._cancelled == {}


async def test_an_inbox_is_bounded_and_ends() -> None:
    inbox = Inbox(limit=2)
    await inbox.put(({"event": "1"}, b""))
    await inbox.put(({"event": "2"}, b""))
    third = asyncio.create_task(inbox.put(({"event": "3"}, b"")))
    await asyncio.sleep(0)
    assert not third.done()
    assert await inbox.take() == ({"event": "1"}, b"")
    await third
    inbox.end(ValueError("nonsense"))
    await inbox.put(({"event": "4"}, b""))
    assert [await inbox.take() for _ in range(2)] == [({"event": name}, b"") for name in ("2", "3")]
    with pytest.raises(ValueError, match="nonsense"):
        await inbox.take()
