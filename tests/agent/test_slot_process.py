"""A slot's child process: real engines, and engines that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import struct
import sys
import termios
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fleet_agent import frames
from fleet_agent.describe import describe_engines
from fleet_agent.slot_process import SlotCrashedError, SlotProcess, spawn_child
from tests.agent.helpers import PLUGINS, alive, children_of
from tests.waiting import wait_until

Events = list[tuple[frames.Message, bytes]]


@contextlib.asynccontextmanager
async def slot_in(folder: Path) -> AsyncIterator[SlotProcess]:
    slot = SlotProcess(0, folder / "models", folder)
    try:
        yield slot
    finally:
        await slot.close()


@pytest.fixture
async def slot(tmp_path: Path) -> AsyncIterator[SlotProcess]:
    async with slot_in(tmp_path) as slot:
        yield slot


def task_of(folder: Path, prompt: str = "paint", token: str = "t1", engine: str = "probe", **fields: Any) -> Any:
    output = folder / f"out-{token}"
    output.mkdir(exist_ok=True)
    return {
        "token": token,
        "job_id": f"job-{token}",
        "job_type": "image_gen",
        "engine": engine,
        "model": None,
        "loras": [],
        "fields": {"prompt": prompt, **fields},
        "seed": str(2**64 - 1),
        "output_folder": str(output),
        "previews": True,
    }


async def run(slot: SlotProcess, task: frames.Message, into: Events | None = None) -> Events:
    found: Events = [] if into is None else into
    async for frame in slot.run(task):
        found.append(frame)
    return found


def gone(pid: int) -> bool:
    return not alive(pid)


def words(events: Events) -> list[str]:
    return [event["event"] for event, _ in events]


async def running(slot: SlotProcess, task: frames.Message) -> tuple[asyncio.Task[Events], Events]:
    """A task that has made its first step."""
    events: Events = []
    work = asyncio.create_task(run(slot, task, events))
    await wait_until(lambda: "progress" in words(events) or work.done())
    return work, events


async def test_the_sketch_engine_paints_in_its_child(slot: SlotProcess, tmp_path: Path) -> None:
    events = await run(slot, task_of(tmp_path, "a sunset", engine="sketch", width=64, height=64, steps=4))
    assert words(events)[0] == "started"
    steps = [event["step"] for event, _ in events if event["event"] == "progress"]
    assert steps == sorted(steps)
    assert steps[-1] == 4
    previews = [(event["content_type"], blob) for event, blob in events if event["event"] == "preview"]
    assert previews
    assert all(kind == "image/jpeg" and blob.startswith(b"\xff\xd8") for kind, blob in previews)
    done = events[-1][0]
    assert (done["event"], done["outputs"][0]["content_type"]) == ("done", "image/png")
    assert (done["outputs"][0]["width"], done["outputs"][0]["seed"]) == (64, 2**64 - 1)
    assert done["run_seconds"] > 0
    with Image.open(done["outputs"][0]["path"]) as picture:
        assert picture.size == (64, 64)
    assert [(model.engine, model.name) for model in slot.loaded] == [("sketch", "sketch")]


async def test_the_fixed_engine_answers_in_its_child(slot: SlotProcess, tmp_path: Path) -> None:
    events = await run(slot, task_of(tmp_path, engine="fixed"))
    done = events[-1][0]
    assert done["event"] == "done"
    assert (tmp_path / "out-t1" / "job-t1.png").stat().st_size > 1_000_000


async def test_one_child_runs_task_after_task(slot: SlotProcess, tmp_path: Path) -> None:
    pids = set()
    for number in range(5):
        assert words(await run(slot, task_of(tmp_path, token=f"t{number}")))[-1] == "done"
        pids.add(slot.pid)
    assert len(pids) == 1
    first, second = slot.loaded[0].loaded_at, slot.loaded[0].used_at
    assert second > first


async def test_a_child_killed_in_mid_run_is_said_and_replaced(slot: SlotProcess, tmp_path: Path) -> None:
    work, _ = await running(slot, task_of(tmp_path, "wait"))
    pid = slot.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(SlotCrashedError, match="was ended by signal 9"):
        await work
    assert (slot.pid, slot.loaded) == (None, ())
    assert words(await run(slot, task_of(tmp_path, token="t2")))[-1] == "done"
    assert slot.pid not in (None, pid)


async def test_an_engine_that_ends_its_process_is_said(slot: SlotProcess, tmp_path: Path) -> None:
    with pytest.raises(SlotCrashedError, match="ended with exit code 7"):
        await run(slot, task_of(tmp_path, "exit"))


async def test_a_child_that_died_while_idle_costs_no_task(slot: SlotProcess, tmp_path: Path) -> None:
    await run(slot, task_of(tmp_path, token="t1"))
    assert slot.pid is not None
    os.kill(slot.pid, signal.SIGKILL)
    # Its end may be heard before or after this task is written to it.
    assert words(await run(slot, task_of(tmp_path, token="t2")))[-1] == "done"


async def test_a_task_is_cancelled_at_its_next_step(slot: SlotProcess, tmp_path: Path) -> None:
    work, _ = await running(slot, task_of(tmp_path, "wait"))
    pid = slot.pid
    slot.cancel("another")
    slot.cancel("t1")
    assert words(await work)[-1] == "cancelled"
    assert slot.pid == pid
    assert words(await run(slot, task_of(tmp_path, token="t2")))[-1] == "done"


async def test_a_task_cancelled_while_its_child_starts_is_not_begun(slot: SlotProcess, tmp_path: Path) -> None:
    events: Events = []
    work = asyncio.create_task(run(slot, task_of(tmp_path, "stubborn"), events))
    await asyncio.sleep(0)
    slot.cancel("t1")
    await work
    assert words(events) == ["cancelled"]
    assert words(await run(slot, task_of(tmp_path, token="t2")))[-1] == "done"


async def test_a_task_cancelled_during_the_pause_after_crashes_is_not_begun(slot: SlotProcess, tmp_path: Path) -> None:
    for number in range(3):
        with pytest.raises(SlotCrashedError):
            await run(slot, task_of(tmp_path, "exit", token=f"c{number}"))
    # Now it would pause for 2 s.
    events: Events = []
    work = asyncio.create_task(run(slot, task_of(tmp_path, "stubborn"), events))
    await asyncio.sleep(0)
    slot.cancel("t1")
    await work
    assert words(events) == ["cancelled"]


async def test_a_stubborn_engine_is_killed_and_costs_no_pause(slot: SlotProcess, tmp_path: Path) -> None:
    work, _ = await running(slot, task_of(tmp_path, "stubborn"))
    slot.cancel("t1")
    slot.kill()
    with pytest.raises(SlotCrashedError, match="signal 9"):
        await work
    assert slot._crashes == 0


async def test_what_an_engine_started_ends_with_it(slot: SlotProcess, tmp_path: Path) -> None:
    brood = tmp_path / "brood"
    for end in ("kill", "crash"):
        work, _ = await running(slot, task_of(tmp_path, "brood", token=end))
        grandchild = int(await wait_until(lambda: brood.exists() and brood.read_text()))
        assert alive(grandchild)
        if end == "kill":
            slot.kill()
        else:
            assert slot.pid is not None
            os.kill(slot.pid, signal.SIGKILL)
        with pytest.raises(SlotCrashedError):
            await work
        await wait_until(partial(gone, grandchild))
        brood.unlink()


async def test_noise_on_stdout_does_not_break_frames(
    slot: SlotProcess, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    events = await run(slot, task_of(tmp_path, "noise"))
    assert words(events) == ["started", "progress", "progress", "done"]
    assert events[1][0]["message"] == "after the noise"
    await slot.close()
    captured = capfd.readouterr()
    assert "a library's banner" in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("prompt", "reason", "retryable", "detail"),
    [
        ("memory", "OUT_OF_MEMORY", True, "ran out of memory"),
        ("vram", "OUT_OF_MEMORY", True, "8 GB are not enough"),
        ("bug", "ENGINE_FAILED", True, "ValueError: a lone surrogate: ?"),
        (f"big {17 << 20}", "ENGINE_FAILED", False, "cannot be sent"),
        ("unknown_behaviour", "ENGINE_FAILED", True, "AttributeError"),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else None,
)
async def test_a_failure_is_told_and_the_child_goes_on(
    slot: SlotProcess, tmp_path: Path, prompt: str, reason: str, retryable: bool, detail: str
) -> None:
    last = (await run(slot, task_of(tmp_path, prompt)))[-1][0]
    assert (last["event"], last["reason"], last["retryable"]) == ("failed", reason, retryable)
    assert detail in last["detail"]
    assert len(last["detail"]) <= 2000
    pid = slot.pid
    assert words(await run(slot, task_of(tmp_path, token="t2")))[-1] == "done"
    assert slot.pid == pid


async def test_a_large_result_passes(slot: SlotProcess, tmp_path: Path) -> None:
    last = (await run(slot, task_of(tmp_path, f"big {15 << 20}")))[-1][0]
    assert len(last["text"]) == 15 << 20


async def test_an_engine_that_cannot_tell_what_it_has_loaded_still_gives_its_result(
    slot: SlotProcess, tmp_path: Path
) -> None:
    last = (await run(slot, task_of(tmp_path, "forgetful")))[-1][0]
    assert (last["event"], last["loaded"]) == ("done", [])


def waiting_bytes(fd: int) -> int:
    """Bytes in a pipe that nobody has read yet."""
    return int(struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, b"\0" * 4))[0])


async def test_an_engine_that_talks_without_end_does_not_hold_the_loop(slot: SlotProcess, tmp_path: Path) -> None:
    """Between two of its frames every other task gets its turn."""
    events: Events = []
    work = asyncio.create_task(run(slot, task_of(tmp_path, "chatter"), events))
    await wait_until(lambda: len(events) > 100)
    assert slot._process is not None
    pipe = slot._process._transport.get_pipe_transport(1).get_extra_info("pipe")  # type: ignore[attr-defined]
    while waiting_bytes(pipe.fileno()) < 30_000:
        # The loop stands still, the engine talks on.
        pass
    most = 0
    for _ in range(50):
        before = len(events)
        await asyncio.sleep(0)
        most = max(most, len(events) - before)
    (tmp_path / "go-job-t1").touch()
    await work
    assert events[-1][0]["text"] == "done talking"
    assert most <= 2


async def test_the_child_ends_with_its_agent(tmp_path: Path) -> None:
    """An agent that is killed has no time to clean up; the engine, which may hold a GPU, must not stay."""
    program = (
        "import asyncio, sys\n"
        "from pathlib import Path\n"
        "from fleet_agent.slot_process import SlotProcess\n"
        "async def main():\n"
        "    slot = SlotProcess(0, Path(sys.argv[1]), Path(sys.argv[1]))\n"
        "    await slot.start()\n"
        "    print(slot.pid, flush=True)\n"
        "    await asyncio.sleep(600)\n"
        "asyncio.run(main())\n"
    )
    agent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, str(tmp_path), stdout=asyncio.subprocess.PIPE
    )
    assert agent.stdout is not None
    pid = int(await agent.stdout.readline())
    assert children_of(agent.pid) == [pid]
    agent.kill()
    await agent.wait()
    await wait_until(lambda: not alive(pid))


async def test_a_child_that_hangs_in_its_imports_ends_with_its_agent(tmp_path: Path) -> None:
    (tmp_path / "orjson.py").write_text(
        "import os, pathlib, time\n"
        "pathlib.Path(os.environ['SEEN']).write_text(str(os.getpid()))\n"
        "while True: time.sleep(600)\n"
    )
    seen = tmp_path / "seen"
    program = (
        "import os, subprocess, sys\n"
        "subprocess.run([sys.executable, '-m', 'fleet_agent.slot', '--models', '/', '--data', '/', '--parent',"
        " str(os.getpid())], env={**os.environ, 'PYTHONPATH': sys.argv[1]})\n"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    agent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, path, env={**os.environ, "SEEN": str(seen)}
    )
    pid = int(await wait_until(lambda: seen.exists() and seen.read_text()))
    assert children_of(agent.pid) == [pid]
    try:
        agent.kill()
        await agent.wait()
        await wait_until(lambda: not alive(pid))
    finally:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)


async def test_a_child_whose_agent_went_before_it_could_ask_the_kernel_ends_at_once() -> None:
    other = os.getppid()
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "fleet_agent.slot", "--models", "/", "--data", "/", "--parent", str(other),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    said, _ = await child.communicate()
    assert (child.returncode, said) == (1, b"")


async def test_a_child_that_loses_its_pipe_ends(tmp_path: Path) -> None:
    child = await spawn_child(tmp_path, tmp_path, stdin=asyncio.subprocess.PIPE)
    assert child.stdin is not None
    assert child.stdout is not None
    assert await frames.receive(child.stdout) == ({"event": "ready"}, b"")
    child.stdin.close()
    assert await child.wait() == 0


async def test_a_child_that_hears_nonsense_ends(tmp_path: Path) -> None:
    child = await spawn_child(tmp_path, tmp_path, stdin=asyncio.subprocess.PIPE)
    assert child.stdin is not None
    child.stdin.write(b"\xff" * 64)
    assert await child.wait() == 1


async def test_a_child_leads_a_process_group_of_its_own(slot: SlotProcess) -> None:
    """Ctrl-C on a terminal reaches the agent, which gives its work back; the engine must not fall before."""
    await slot.start()
    assert slot.pid is not None
    assert os.getpgid(slot.pid) == slot.pid != os.getpgid(0)


async def test_a_child_that_cannot_start_is_said(
    slot: SlotProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/no/such/python")
        with pytest.raises(SlotCrashedError, match="could not be started"):
            await slot.start()
        patch.setattr(sys, "executable", "/bin/false")
        with pytest.raises(SlotCrashedError, match="exit code 1"):
            await run(slot, task_of(tmp_path))
    assert words(await run(slot, task_of(tmp_path)))[-1] == "done"


async def test_engines_are_described_without_importing_them_here(tmp_path: Path) -> None:
    found = await describe_engines(tmp_path, tmp_path, ("probe", "sketch"), 60)
    assert sorted(found["infos"]) == ["probe", "sketch"]
    assert "fleet_probe" not in sys.modules


async def test_a_plug_in_that_kills_its_process_is_reported_and_the_others_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As for an agent that was started with them: it reads their names, and no more.
    monkeypatch.syspath_prepend(PLUGINS)
    for wanted, others in (((), {"choir": "ready"}), (("deadly", "probe", "sketch"), {})):
        found = await describe_engines(tmp_path, tmp_path, wanted, 60)
        statuses = {status["name"]: status["status"] for status in found["statuses"]}
        assert statuses == {"deadly": "failed", "probe": "ready", "sketch": "ready"} | others
        assert sorted(found["infos"]) == sorted(["probe", "sketch", *others])
        (detail,) = [status["detail"] for status in found["statuses"] if status["name"] == "deadly"]
        assert "exit code 9" in detail


async def test_an_engine_that_never_answers_is_reported(tmp_path: Path) -> None:
    found = await describe_engines(tmp_path, tmp_path, ("sketch",), 0.001)
    assert found["infos"] == {}
    assert "said nothing for 0.001 s" in found["statuses"][0]["detail"]
