"""Agent and server over real gRPC: from Hello to CompleteAck, and what is lost on the way."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from fleet.v1 import node_pb2

from fleet_agent import PROTOCOL_VERSION
from tests.agent.helpers import (
    Conversation,
    ScriptedServer,
    agent_running,
    assign_of,
    let_go,
    settings_of,
)
from tests.waiting import wait_until


def ack(talk: Conversation, token: str, outcome: int = node_pb2.COMPLETE_OUTCOME_OK) -> None:
    talk.say(complete_ack=node_pb2.CompleteAck(job_id=f"job-{token}", token=token, outcome=outcome))  # type: ignore[arg-type]


def spool_folders(folder: Path) -> list[str]:
    """The tokens of which something lies in the spool."""
    paths = (path for part in ("entries", "scratch") for path in (folder / "spool" / part).iterdir())
    return sorted({path.name.partition(".")[0] for path in paths})


async def test_an_attempt_from_hello_to_complete_ack(server: ScriptedServer, tmp_path: Path) -> None:
    settings = settings_of(tmp_path, server.address, labels="zone=a", clusters="studio")
    async with agent_running(settings):
        talk = await server.conversation()
        hello = talk.hello
        assert (hello.protocol_version, hello.node_id, hello.slots) == (PROTOCOL_VERSION, "node-1", 1)
        assert (dict(hello.labels), list(hello.clusters)) == ({"zone": "a"}, ["studio"])
        assert [(engine.name, engine.status) for engine in hello.engines] == [("probe", "ready")]
        assert [model.name for model in hello.models] == ["probe"]
        assert len(hello.instance_id) >= 16
        assert hello.host.memory_total_bytes > 0
        assert hello.now.seconds > 1_600_000_000

        talk.say(assign=assign_of("t1", "paint 300000", steps=4))
        complete = await talk.first("complete")
        kinds = talk.kinds("heartbeat", "tick")
        assert kinds == ["accepted", "started", "complete"]
        assert {message.session for message in talk.heard[1:]} == {talk.session}
        assert not complete.HasField("error")
        assert complete.outputs[0].receipt.filename == "t1-0"
        assert (complete.outputs[0].content_type, complete.outputs[0].seed) == ("image/png", 2**64 - 1)
        upload = server.uploads[0]
        assert upload.header.sha256 == hashlib.sha256(upload.data).hexdigest()
        assert (upload.header.job_id, upload.header.token, upload.header.index) == ("job-t1", "t1", 0)
        assert upload.header.size_bytes == len(upload.data) > 300_000
        metadata = complete.metadata
        assert (metadata.engine, metadata.engine_version, metadata.steps) == ("probe", "1.0", 4)
        assert metadata.prompt == "paint 300000"
        assert not metadata.HasField("negative_prompt")

        assert spool_folders(tmp_path) == ["t1"]
        ack(talk, "t1")
        await wait_until(lambda: not spool_folders(tmp_path))
        beat = await talk.first("heartbeat", lambda beat: beat.slots_free == 1 and not beat.held and beat.loaded_models)
        assert [model.name for model in beat.loaded_models] == ["probe"]
        assert len(server.uploads) == 1


async def test_a_large_output_is_sent_in_chunks_of_at_most_a_mebibyte(server: ScriptedServer, tmp_path: Path) -> None:
    async with agent_running(settings_of(tmp_path, server.address)):
        talk = await server.conversation()
        talk.say(assign=assign_of("t1", "paint 5000000"))
        complete = await talk.first("complete")
        assert complete.outputs[0].receipt.size_bytes > 5_000_000


async def test_ticks_come_while_the_engine_works(server: ScriptedServer, tmp_path: Path) -> None:
    settings = settings_of(tmp_path, server.address)
    async with agent_running(settings):
        talk = await server.conversation()
        talk.say(assign=assign_of("t1", "wait"))
        tick = await talk.first("tick")
        assert (tick.progress, tick.step, tick.steps, tick.message) == (25, 1, 4, "waiting")
        beat = await talk.first("heartbeat", lambda beat: beat.held and beat.held[0].progress)
        assert (beat.held[0].token, beat.held[0].job_id, beat.held[0].progress) == ("t1", "job-t1", 25)
        assert (beat.slots, beat.slots_free) == (1, 0)
        let_go(settings, "t1")
        await talk.first("complete")


async def test_heartbeats_count_up_and_name_what_is_spooled(server: ScriptedServer, tmp_path: Path) -> None:
    server.upload_gate.clear()
    async with agent_running(settings_of(tmp_path, server.address)):
        talk = await server.conversation()
        talk.say(assign=assign_of("t1"))
        beat = await talk.first("heartbeat", lambda beat: beat.slots_free == 1 and beat.held)
        assert [(held.token, held.progress) for held in beat.held] == [("t1", 100)]
        server.upload_gate.set()
        await talk.first("complete")
        sequences = [beat.sequence for beat in talk.all("heartbeat")]
        assert sequences == list(range(1, len(sequences) + 1))


async def test_an_unacknowledged_end_is_said_again_without_a_second_upload(
    server: ScriptedServer, tmp_path: Path
) -> None:
    async with agent_running(settings_of(tmp_path, server.address, resend_seconds=0.05)):
        talk = await server.conversation()
        talk.say(assign=assign_of("t1"))
        await wait_until(lambda: len(talk.all("complete")) >= 3)
        assert len(server.uploads) == 1
        ack(talk, "t1", node_pb2.COMPLETE_OUTCOME_ALREADY)
        await wait_until(lambda: not spool_folders(tmp_path))


async def test_the_server_goes_while_an_attempt_runs_and_hears_of_it_again(
    server: ScriptedServer, tmp_path: Path
) -> None:
    settings = settings_of(tmp_path, server.address)
    async with agent_running(settings) as agent:
        talk = await server.conversation()
        talk.say(assign=assign_of("t1", "wait"))
        await talk.first("tick")
        await server.stop()
        await wait_until(lambda: agent.session._link is None)
        await server.start()
        again = await server.conversation(1)
        assert [(held.token, held.step, held.steps) for held in again.hello.held] == [("t1", 1, 4)]
        assert again.hello.instance_id == talk.hello.instance_id
        assert not again.hello.spooled
        started = await again.first("started")
        assert (started.job_id, started.token) == ("job-t1", "t1")
        let_go(settings, "t1")
        complete = await again.first("complete")
        assert not complete.HasField("error")
        assert {message.session for message in again.heard[1:]} == {again.session}


async def test_an_end_that_came_while_the_server_was_away_is_delivered_after_the_next_welcome(
    server: ScriptedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(tmp_path, server.address)
    hellos: list[node_pb2.Hello] = []
    async with agent_running(settings) as agent:
        talk = await server.conversation()
        hello = agent.session._hello

        async def noted() -> node_pb2.Hello:
            hellos.append(await hello())
            return hellos[-1]

        monkeypatch.setattr(agent.session, "_hello", noted)
        talk.say(assign=assign_of("t1", "wait"))
        await talk.first("started")
        await server.stop()
        let_go(settings, "t1")
        # A dial that began before the end came would still find the server, with a Hello of before.
        await wait_until(lambda: hellos and hellos[-1].spooled)
        await server.start()
        again = await server.conversation(1)
        assert [held.token for held in again.hello.spooled] == ["t1"]
        assert not again.hello.held
        complete = await again.first("complete")
        assert complete.outputs[0].receipt.filename == "t1-0"
        ack(again, "t1", node_pb2.COMPLETE_OUTCOME_REFUSED)
        await wait_until(lambda: not spool_folders(tmp_path))


async def test_kill_tokens_stop_held_attempts_without_a_word(server: ScriptedServer, tmp_path: Path) -> None:
    async with agent_running(settings_of(tmp_path, server.address)):
        talk = await server.conversation()
        talk.say(assign=assign_of("t1", "wait"))
        await talk.first("started")
        server.kill_tokens = ["t1", "never-heard-of"]
        talk.end()
        again = await server.conversation(1)
        await again.first("heartbeat", lambda beat: beat.slots_free == 1)
        assert set(again.kinds("heartbeat")) <= {"started", "tick"}
        await wait_until(lambda: not spool_folders(tmp_path))


async def test_drop_tokens_of_a_heartbeat_stop_attempts(server: ScriptedServer, tmp_path: Path) -> None:
    async with agent_running(settings_of(tmp_path, server.address)):
        talk = await server.conversation()
        talk.say(assign=assign_of("t1", "wait"))
        beat = await talk.first("heartbeat", lambda beat: beat.held)
        talk.say(heartbeat_ack=node_pb2.HeartbeatAck(sequence=beat.sequence, drop_tokens=["t1"]))
        await talk.first("heartbeat", lambda beat: beat.slots_free == 1 and beat.sequence > 1)
        assert not {"complete", "stopped", "released"} & set(talk.kinds())


async def test_a_cancel_is_answered_by_job_stopped_once_the_slot_is_free(
    server: ScriptedServer, tmp_path: Path
) -> None:
    async with agent_running(settings_of(tmp_path, server.address, cancel_grace_seconds=50)) as agent:
        talk = await server.conversation()
        talk.say(assign=assign_of("t1", "wait"))
        await talk.first("started")
        pid = agent.runner._slots[0].pid
        talk.say(cancel=node_pb2.CancelAttempt(job_id="job-t1", token="t1"))
        stopped = await talk.first("stopped")
        assert (stopped.job_id, stopped.token) == ("job-t1", "t1")
        talk.say(assign=assign_of("t2"))
        await talk.about("complete", "t2")
        assert agent.runner._slots[0].pid == pid
        assert [complete.token for complete in talk.all("complete")] == ["t2"]
        assert not talk.all("rejected")


async def test_a_cancel_of_what_is_not_here_is_answered_at_once(server: ScriptedServer, tmp_path: Path) -> None:
    async with agent_running(settings_of(tmp_path, server.address)):
        talk = await server.conversation()
        talk.say(cancel=node_pb2.CancelAttempt(job_id="job-gone", token="gone"))
        stopped = await talk.first("stopped")
        assert (stopped.job_id, stopped.token) == ("job-gone", "gone")


async def test_cancel_right_behind_its_assign(server: ScriptedServer, tmp_path: Path) -> None:
    async with agent_running(settings_of(tmp_path, server.address, cancel_grace_seconds=30)):
        talk = await server.conversation()
        for number in range(5):
            token = f"t{number}"
            talk.say(assign=assign_of(token, "wait"))
            talk.say(cancel=node_pb2.CancelAttempt(job_id=f"job-{token}", token=token))
            await talk.about("stopped", token)
        assert not talk.all("complete")


async def test_messages_of_another_session_are_ignored(server: ScriptedServer, tmp_path: Path) -> None:
    async with agent_running(settings_of(tmp_path, server.address)):
        talk = await server.conversation()
        talk.say(session="another", assign=assign_of("t1"))
        talk.say(session="", assign=assign_of("t2"))
        talk.say(assign=assign_of("t3"))
        await talk.first("complete")
        assert [accepted.token for accepted in talk.all("accepted")] == ["t3"]


async def test_an_assign_that_comes_twice_runs_once(server: ScriptedServer, tmp_path: Path) -> None:
    settings = settings_of(tmp_path, server.address, slots=2)
    async with agent_running(settings):
        talk = await server.conversation()
        talk.say(assign=assign_of("t1", "wait"))
        talk.say(assign=assign_of("t1", "wait"))
        await wait_until(lambda: len(talk.all("accepted")) == 2)
        await talk.first("heartbeat", lambda beat: beat.slots_free == 1 and len(beat.held) == 1)
        let_go(settings, "t1")
        await talk.first("complete")
        talk.say(assign=assign_of("t1", "wait"))
        ack(talk, "t1")
        await wait_until(lambda: not spool_folders(tmp_path))
        assert len(talk.all("started")) == 1


async def test_timeout_seconds_end_an_attempt_as_a_failure_that_may_be_retried(
    server: ScriptedServer, tmp_path: Path
) -> None:
    async with agent_running(settings_of(tmp_path, server.address)):
        talk = await server.conversation()
        for token, prompt in (("t1", "wait"), ("t2", "stubborn")):
            talk.say(assign=assign_of(token, prompt, timeout_seconds=0.2))
            complete = await talk.about("complete", token)
            assert (complete.error.reason, complete.error.code) == ("TIMEOUT", "DEADLINE_EXCEEDED")
            assert "0.2 seconds" in complete.error.detail
            assert complete.retryable
            ack(talk, token)


async def test_no_timeout_where_none_is_given(server: ScriptedServer, tmp_path: Path) -> None:
    settings = settings_of(tmp_path, server.address)
    async with agent_running(settings):
        talk = await server.conversation()
        talk.say(assign=assign_of("t1", "wait", timeout_seconds=0))
        await talk.first("tick")
        let_go(settings, "t1")
        assert not (await talk.first("complete")).HasField("error")


async def test_previews_only_of_what_somebody_looks_at(server: ScriptedServer, tmp_path: Path) -> None:
    settings = settings_of(tmp_path, server.address, slots=2)
    async with agent_running(settings):
        talk = await server.conversation()
        talk.say(assign=assign_of("seen", "looked", previews=True))
        talk.say(assign=assign_of("unseen", "looked"))
        preview = await talk.first("preview")
        assert (preview.preview.content_type, preview.preview.data) == ("image/jpeg", b"picture")
        assert (preview.progress, preview.step, preview.steps) == (50, 1, 2)
        await talk.about("tick", "unseen")
        assert {preview.token for preview in talk.all("preview")} == {"seen"}

        talk.say(heartbeat_ack=node_pb2.HeartbeatAck(sequence=1, preview_tokens=["unseen"]))
        await talk.about("preview", "unseen")
        since, beats = len(talk.heard), len(talk.all("heartbeat"))
        await talk.first("heartbeat", lambda beat: beat.sequence > beats + 8)
        later = [message.preview.token for message in talk.heard[since:] if message.HasField("preview")]
        assert set(later) == {"unseen"}
        for token in ("seen", "unseen"):
            let_go(settings, token)
        await wait_until(lambda: len(talk.all("complete")) == 2)
