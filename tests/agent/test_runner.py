"""What goes wrong with an attempt is the end of that attempt: told to the server, and never the end of the agent."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from fleet.v1 import node_pb2, types_pb2

from fleet_agent.attempt import Stop
from fleet_agent.journal import Journal
from fleet_agent.slot_process import SlotProcess
from fleet_agent.spool import Spool, SpoolEntry
from tests.agent.helpers import ScriptedServer, agent_running, assign_of, let_go, settings_of
from tests.waiting import wait_until


async def ended(server: ScriptedServer, folder: Path, prompt: str, **more: Any) -> node_pb2.JobComplete:
    """The end of one attempt, after which another one succeeds on the same agent."""
    async with agent_running(settings_of(folder, server.address, **more)) as agent:
        talk = await server.conversation()
        talk.say(assign=assign_of("t1", prompt))
        complete: node_pb2.JobComplete = await talk.about("complete", "t1")
        assert "t1" not in [attempt.token for attempt in agent.runner.running()]
        talk.say(complete_ack=node_pb2.CompleteAck(job_id="job-t1", token="t1"))
        talk.say(assign=assign_of("t2"))
        assert not (await talk.about("complete", "t2")).HasField("error")
        return complete


@pytest.mark.parametrize(
    ("prompt", "reason", "code", "detail"),
    [
        ("exit", "ENGINE_FAILED", "INTERNAL", "ended with exit code 7"),
        ("memory", "OUT_OF_MEMORY", "RESOURCE_EXHAUSTED", "out of memory"),
        ("bug", "ENGINE_FAILED", "INTERNAL", "surrogate"),
        ("quit", "ENGINE_FAILED", "INTERNAL", "without having been told to"),
        ("absent", "ENGINE_FAILED", "INTERNAL", "absent.png"),
        ("outside", "ENGINE_FAILED", "INTERNAL", "not in its output folder"),
        ("senseless", "ENGINE_FAILED", "INTERNAL", "makes no sense"),
    ],
)
async def test_an_engine_that_fails(
    server: ScriptedServer, tmp_path: Path, prompt: str, reason: str, code: str, detail: str
) -> None:
    complete = await ended(server, tmp_path, prompt)
    assert (complete.error.reason, complete.error.code, complete.retryable) == (reason, code, True)
    assert detail in complete.error.detail
    assert complete.metadata.engine == "probe"
    assert (tmp_path / "precious").exists() == (prompt == "outside")


async def test_a_child_killed_in_mid_run(server: ScriptedServer, tmp_path: Path) -> None:
    async with agent_running(settings_of(tmp_path, server.address)) as agent:
        talk = await server.conversation()
        talk.say(assign=assign_of("t1", "wait"))
        await talk.first("tick")
        pid = agent.runner._slots[0].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        complete = await talk.first("complete")
        assert (complete.error.reason, complete.retryable) == ("ENGINE_FAILED", True)
        assert "signal 9" in complete.error.detail
        # A new child is there before the next task needs it.
        await wait_until(lambda: agent.runner._slots[0].pid not in (None, pid))


async def test_a_cancelled_engine_that_does_not_stop_is_killed(server: ScriptedServer, tmp_path: Path) -> None:
    async with agent_running(settings_of(tmp_path, server.address)) as agent:
        talk = await server.conversation()
        talk.say(assign=assign_of("t1", "stubborn"))
        await talk.first("tick")
        pid = agent.runner._slots[0].pid
        talk.say(cancel=node_pb2.CancelAttempt(job_id="job-t1", token="t1"))
        await talk.about("stopped", "t1")
        assert agent.runner._slots[0].pid != pid
        assert not talk.all("complete")
        talk.say(assign=assign_of("t2"))
        await talk.about("complete", "t2")


async def test_an_attempt_cancelled_before_it_began_does_not_begin(server: ScriptedServer, tmp_path: Path) -> None:
    async with agent_running(settings_of(tmp_path, server.address, cancel_grace_seconds=20)) as agent:
        talk = await server.conversation()
        await talk.first("heartbeat")
        agent.runner.assign(assign_of("t1", "stubborn"))
        agent.runner.cancel("job-t1", "t1")
        await talk.about("stopped", "t1")
        assert talk.kinds("heartbeat") == ["accepted", "stopped"]


async def test_what_comes_after_the_release_is_refused(server: ScriptedServer, tmp_path: Path) -> None:
    async with agent_running(settings_of(tmp_path, server.address, slots=2)) as agent:
        talk = await server.conversation()
        talk.say(assign=assign_of("t1", "wait"))
        await talk.about("tick", "t1")
        release = asyncio.create_task(agent.runner.release())
        await talk.about("released", "t1")
        await release
        talk.say(assign=assign_of("t2"))
        assert (await talk.about("rejected", "t2")).reason == "DRAINING"
        assert agent.runner.slots_free == 2


async def test_a_result_that_came_after_its_cancel_is_thrown_away(server: ScriptedServer, tmp_path: Path) -> None:
    async with agent_running(settings_of(tmp_path, server.address, cancel_grace_seconds=20)):
        talk = await server.conversation()
        talk.say(assign=assign_of("t1", "late"))
        await talk.first("tick")
        talk.say(cancel=node_pb2.CancelAttempt(job_id="job-t1", token="t1"))
        await talk.about("stopped", "t1")
        assert not talk.all("complete")
        assert [path for path in (tmp_path / "spool").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("step", ["stage", "commit"])
async def test_a_cancel_while_the_end_is_being_written(
    server: ScriptedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    entered, leave = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    real = getattr(Spool, step)

    def slow(self: Spool, *arguments: Any) -> Any:
        loop.call_soon_threadsafe(entered.set)
        asyncio.run_coroutine_threadsafe(leave.wait(), loop).result(50)
        return real(self, *arguments)

    monkeypatch.setattr(Spool, step, slow)
    async with agent_running(settings_of(tmp_path, server.address, resend_seconds=0.05)) as agent:
        talk = await server.conversation()
        talk.say(assign=assign_of("t1"))
        await entered.wait()
        talk.say(cancel=node_pb2.CancelAttempt(job_id="job-t1", token="t1"))
        await wait_until(lambda: [attempt.stop for attempt in agent.runner._running.values()] == [Stop.CANCELLED])
        leave.set()
        await talk.about("stopped", "t1")
        assert not agent.runner.spooled()
        assert not agent.runner.deliveries._tasks
        assert [path for path in (tmp_path / "spool").rglob("*") if path.is_file()] == []
        talk.say(assign=assign_of("t2"))
        await talk.about("complete", "t2")
        assert {complete.token for complete in talk.all("complete")} == {"t2"}


async def test_the_stronger_of_two_reasons_to_stop_stands(server: ScriptedServer, tmp_path: Path) -> None:
    async with agent_running(settings_of(tmp_path, server.address)) as agent:
        talk = await server.conversation()
        for token, reasons in (
            ("t1", (Stop.TIMEOUT, Stop.CANCELLED)),
            ("t2", (Stop.CANCELLED, Stop.DROPPED)),
            ("t3", (Stop.RELEASED, Stop.CANCELLED, Stop.TIMEOUT)),
        ):
            talk.say(assign=assign_of(token, "stubborn"))
            await talk.about("tick", token)
            for reason in reasons:
                agent.runner.stop([token], reason)
            await talk.about("stopped", token)
        assert not {"complete", "released"} & set(talk.kinds())


@pytest.mark.parametrize(
    ("number", "reason"),
    [(errno.ENOSPC, "DISK_FULL"), (errno.EDQUOT, "DISK_FULL"), (errno.EIO, "ENGINE_FAILED")],
    ids=["no space", "quota", "broken disk"],
)
async def test_outputs_that_the_disk_does_not_take(
    server: ScriptedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, reason: str
) -> None:
    stage = Spool.stage

    def full(self: Spool, complete: node_pb2.JobComplete, outputs: list[tuple[Path, str]]) -> Any:
        if complete.token == "t1" and outputs:
            raise OSError(number, os.strerror(number))
        return stage(self, complete, outputs)

    monkeypatch.setattr(Spool, "stage", full)
    complete = await ended(server, tmp_path, "paint")
    assert (complete.error.reason, complete.retryable) == (reason, True)
    assert os.strerror(number) in complete.error.detail
    assert not complete.outputs


async def test_an_end_that_the_disk_does_not_take_at_all_is_said_all_the_same(
    server: ScriptedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = Spool.commit

    def full(self: Spool, entry: SpoolEntry) -> None:
        if entry.token == "t1":
            self.remove(entry.token)
            raise OSError(errno.ENOSPC, "no space left on device")
        commit(self, entry)

    append = Journal._append

    def full_too(self: Journal, data: bytes) -> None:
        if b"t1" in data:
            raise OSError(errno.ENOSPC, "no space left on device")
        append(self, data)

    monkeypatch.setattr(Spool, "commit", full)
    monkeypatch.setattr(Journal, "_append", full_too)
    complete = await ended(server, tmp_path, "paint")
    assert complete.error.reason == "DISK_FULL"


async def test_a_bug_of_the_agent_fails_the_attempt_alone(
    server: ScriptedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Spool.stage

    def broken(self: Spool, complete: node_pb2.JobComplete, outputs: list[tuple[Path, str]]) -> Any:
        if complete.token == "t1":
            raise ZeroDivisionError("a bug of ours")
        return stage(self, complete, outputs)

    monkeypatch.setattr(Spool, "stage", broken)
    complete = await ended(server, tmp_path, "paint")
    assert (complete.error.reason, complete.retryable) == ("ENGINE_FAILED", True)
    assert "a bug of ours" in complete.error.detail


async def test_a_slot_that_cannot_start_its_child_fails_the_attempt_alone(
    server: ScriptedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with agent_running(settings_of(tmp_path, server.address)) as agent:
        talk = await server.conversation()
        await agent.runner._slots[0].close()
        with monkeypatch.context() as patch:
            patch.setattr("sys.executable", "/no/such/python")
            talk.say(assign=assign_of("t1"))
            complete = await talk.about("complete", "t1")
        assert (complete.error.reason, complete.retryable) == ("ENGINE_FAILED", True)
        assert "could not be started" in complete.error.detail
        talk.say(assign=assign_of("t2"))
        assert not (await talk.about("complete", "t2")).HasField("error")


async def test_a_child_that_does_not_speak_frames_fails_the_attempt_alone(
    server: ScriptedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nonsense(self: SlotProcess, message: dict[str, Any]) -> Any:
        if message["token"] == "t1":
            yield {"event": "progress", "token": "t1"}, b""
        async for frame in run(self, message):
            yield frame

    run = SlotProcess.run
    monkeypatch.setattr(SlotProcess, "run", nonsense)
    complete = await ended(server, tmp_path, "paint")
    assert (complete.error.reason, complete.retryable) == ("ENGINE_FAILED", True)


async def test_work_is_refused_with_a_reason(server: ScriptedServer, tmp_path: Path) -> None:
    settings = settings_of(tmp_path, server.address)
    async with agent_running(settings) as agent:
        talk = await server.conversation()

        async def refused(assign: node_pb2.Assign) -> tuple[str, str]:
            talk.say(assign=assign)
            rejected = await talk.about("rejected", assign.token)
            assert rejected.job_id == assign.job_id
            return rejected.reason, rejected.detail

        assert await refused(assign_of("a", model="none.safetensors")) == (
            "MODEL_NOT_FOUND",
            "this node has no checkpoint none.safetensors",
        )
        assert await refused(assign_of("b", loras={"none.safetensors": 1})) == (
            "LORA_NOT_FOUND",
            "this node has no lora none.safetensors",
        )
        video = node_pb2.Assign(job_id="job-c", token="c", job_type=types_pb2.JOB_TYPE_VIDEO_GEN)
        video.payload.video_gen.prompt = "x"
        assert await refused(video) == ("CAPABILITY_MISSING", "no engine of this node runs video_gen")
        empty = node_pb2.Assign(job_id="job-d", token="d", job_type=types_pb2.JOB_TYPE_IMAGE_GEN)
        assert (await refused(empty))[0] == "CAPABILITY_MISSING"
        newer = assign_of("e")
        newer.job_type = 99  # type: ignore[assignment]
        assert (await refused(newer))[0] == "CAPABILITY_MISSING"
        assert (await refused(assign_of("../f")))[0] == "CAPABILITY_MISSING"

        talk.say(assign=assign_of("t1", "wait"))
        await talk.about("started", "t1")
        assert (await refused(assign_of("g")))[0] == "SLOTS_FULL"
        let_go(settings, "t1")
        await talk.about("complete", "t1")

        settings.disk_floor_bytes = 1 << 60
        assert (await refused(assign_of("h")))[0] == "DISK_FULL"
        settings.disk_floor_bytes = 0
        agent.runner._draining = True
        assert (await refused(assign_of("i")))[0] == "DRAINING"
        assert [accepted.token for accepted in talk.all("accepted")] == ["t1"]
        assert not list((tmp_path / "spool" / "scratch").iterdir())
        assert len(server.conversations) == 1


async def test_slots_work_at_the_same_time_and_prefer_the_model_they_hold(
    server: ScriptedServer, tmp_path: Path
) -> None:
    settings = settings_of(tmp_path, server.address, slots=3)
    async with agent_running(settings) as agent:
        talk = await server.conversation()
        tokens = ["t1", "t2", "t3"]
        for token in tokens:
            talk.say(assign=assign_of(token, "wait", model="probe"))
        for token in tokens:
            await talk.about("tick", token)
        beat = await talk.first("heartbeat", lambda beat: len(beat.held) == 3)
        assert beat.slots_free == 0
        let_go(settings, "t2")
        await talk.about("complete", "t2")
        # The middle slot has the model now.
        talk.say(assign=assign_of("t4", "wait", model="probe"))
        await talk.about("tick", "t4")
        slots = agent.runner._slots
        assert agent.runner._running["t4"].slot is slots[1]
        for token in ("t1", "t3", "t4"):
            let_go(settings, token)
            await talk.about("complete", token)
        beat = await talk.first("heartbeat", lambda beat: beat.slots_free == 3)
        (loaded,) = agent.runner.loaded()
        assert (loaded.name, loaded.engine, loaded.memory_bytes) == ("probe", "probe", 3 * 4096)
        assert loaded.loaded_seconds_ago >= loaded.used_seconds_ago >= 0


async def test_a_custom_payload_reaches_the_engine_as_it_is(server: ScriptedServer, tmp_path: Path) -> None:
    assign = node_pb2.Assign(job_id="job-t1", token="t1", job_type=types_pb2.JOB_TYPE_CUSTOM, timeout_seconds=60)
    assign.payload.custom.update({"model": "mine", "seed": 4, "loras": ["a"], "n": 1.5})
    async with agent_running(settings_of(tmp_path, server.address)):
        talk = await server.conversation()
        talk.say(assign=assign)
        complete = await talk.first("complete")
        assert complete.text == "[('loras', ['a']), ('model', 'mine'), ('n', 1.5), ('seed', 4.0)]"
        assert complete.exit_code == 3


async def test_a_model_and_a_lora_of_the_sketch_engine(server: ScriptedServer, tmp_path: Path) -> None:
    from fleet_agent.engines import sketch_model

    models = str(tmp_path / "models")
    assert sketch_model.main(["--out", models, "--name", "same.safetensors"]) == 0
    assert sketch_model.main(["--out", models, "--name", "same.safetensors", "--lora"]) == 0
    async with agent_running(settings_of(tmp_path, server.address, engines=("sketch",))) as agent:
        talk = await server.conversation()
        await wait_until(lambda: all(model.sha256 for model in agent.inventory.models() if model.format))
        loras = {"same.safetensors": 0.5}
        assign = assign_of("t1", "a sunset", model="same.safetensors", loras=loras, width=64, height=64, steps=2)
        talk.say(assign=assign)
        complete = await talk.first("complete")
        assert not complete.HasField("error"), complete.error
        metadata = complete.metadata
        assert (metadata.model, metadata.resolved_model) == ("same.safetensors", "same.safetensors")
        assert len(metadata.model_sha256) == 64
        assert [(lora.name, lora.weight, len(lora.sha256)) for lora in metadata.loras] == [
            ("same.safetensors", 0.5, 64)
        ]
        assert metadata.loras[0].sha256 != metadata.model_sha256
        (loaded,) = agent.runner.loaded()
        assert (loaded.name, list(loaded.loras)) == ("same.safetensors", ["same.safetensors"])


async def test_ends_of_an_earlier_agent_are_found(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    Spool(tmp_path / "spool").add(node_pb2.JobComplete(job_id="job-old", token="old"), [])
    async with agent_running(settings) as agent:
        await wait_until(agent.runner.spooled)
        assert [(held.job_id, held.token, held.progress) for held in agent.runner.spooled()] == [
            ("job-old", "old", 100)
        ]
