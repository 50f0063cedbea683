"""What engines say besides progress and pictures, on its way to the server; and the memory that they may have."""

from __future__ import annotations

import json
from pathlib import Path

from fleet.v1 import node_pb2

from tests.agent.helpers import ScriptedServer, agent_running, assign_of, settings_of
from tests.waiting import wait_until


async def test_frames_and_text_come_in_order_and_before_the_end(server: ScriptedServer, tmp_path: Path) -> None:
    async with agent_running(settings_of(tmp_path, server.address)):
        talk = await server.conversation()
        talk.say(assign=assign_of("t1", "tell"))
        complete: node_pb2.JobComplete = await talk.about("complete", "t1")
        kinds = talk.kinds("heartbeat", "accepted", "started")
        assert kinds[-1] == "complete"
        frames = [frame.text for frame in talk.all("frame") if frame.HasField("text")]
        assert [json.loads(text)["data"] for text in frames] == [0, 1, 2]
        assert {frame.job_id for frame in talk.all("frame")} == {"job-t1"}
        ticks = [tick for tick in talk.all("tick") if tick.HasField("text")]
        assert "".join(tick.text for tick in ticks) == "wowoword?"
        at = 0
        for tick in ticks:
            assert tick.text_offset == at
            at += len(tick.text)
        assert (complete.text, complete.finish_reason, complete.usage.total_tokens) == ("word", "stop", 3)
        [segment] = complete.segments
        assert (segment.end_seconds, segment.text) == (1.5, "word")
        assert complete.engine_record_json == '{"outputs": {}}'


async def test_a_failure_keeps_what_there_is(server: ScriptedServer, tmp_path: Path) -> None:
    async with agent_running(settings_of(tmp_path, server.address)):
        talk = await server.conversation()
        talk.say(assign=assign_of("t1", "fail"))
        complete: node_pb2.JobComplete = await talk.about("complete", "t1")
        assert (complete.error.reason, complete.exit_code, complete.engine_record_json) == ("EXIT_NONZERO", 3, "{}")
        assert not complete.retryable


async def test_an_engine_that_takes_too_much_memory_is_ended(server: ScriptedServer, tmp_path: Path) -> None:
    settings = settings_of(tmp_path, server.address, engine_memory_bytes=300_000_000)
    async with agent_running(settings) as agent:
        talk = await server.conversation()
        talk.say(assign=assign_of("t1", "hog 400000000"))
        complete: node_pb2.JobComplete = await talk.about("complete", "t1")
        assert (complete.error.reason, complete.retryable) == ("OUT_OF_MEMORY", True)
        assert "FLEET_AGENT_ENGINE_MEMORY_BYTES" in complete.error.detail
        # The agent lives, and its slot works on.
        await wait_until(lambda: agent.runner.slots_free)
        talk.say(assign=assign_of("t2", "paint"))
        assert not (await talk.about("complete", "t2")).HasField("error")


async def test_the_kernel_would_end_an_engine_before_its_agent(server: ScriptedServer, tmp_path: Path) -> None:
    async with agent_running(settings_of(tmp_path, server.address)) as agent:
        pid = await wait_until(lambda: agent.runner.slots[0].pid)
        score = Path(f"/proc/{pid}/oom_score_adj")
        await wait_until(lambda: score.read_text().strip() == "500")
