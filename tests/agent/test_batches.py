"""What waits to be said goes out together, and what need not be heard at once waits a little for company."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from fleet.v1 import node_pb2, types_pb2
from google.protobuf import json_format

from fleet_agent.attempt import _plain
from fleet_agent.outbox import BATCH_BYTES, BATCH_MESSAGES, Outbox
from tests.agent.helpers import ScriptedServer, agent_running, assign_of, settings_of
from tests.waiting import wait_until


def complete(token: str, text: str = "") -> node_pb2.AgentMessage:
    return node_pb2.AgentMessage(session="s", complete=node_pb2.JobComplete(token=token, text=text))


def started(token: str) -> node_pb2.AgentMessage:
    return node_pb2.AgentMessage(session="s", started=node_pb2.JobStarted(token=token))


async def test_what_waits_behind_a_message_goes_with_it_in_order() -> None:
    outbox = Outbox()
    outbox.control(started("1"))
    outbox.control(complete("1"))
    outbox.control(complete("2"))
    whole = outbox.with_company(await outbox.next())
    kinds = [one.WhichOneof("message") for one in whole.batch.messages]
    assert (whole.session, kinds) == ("s", ["started", "complete", "complete"])
    assert [one.complete.token for one in whole.batch.messages[1:]] == ["1", "2"]
    outbox.written()
    await asyncio.wait_for(outbox.drained(), 50)


async def test_alone_it_goes_as_it_is() -> None:
    outbox = Outbox()
    outbox.control(complete("1"))
    assert outbox.with_company(await outbox.next()) == complete("1")


async def test_a_batch_is_bounded_in_messages_and_in_bytes() -> None:
    outbox = Outbox()
    for number in range(BATCH_MESSAGES + 5):
        outbox.control(complete(str(number)))
    assert len(outbox.with_company(await outbox.next()).batch.messages) == BATCH_MESSAGES
    assert len(outbox.with_company(await outbox.next()).batch.messages) == 5
    for number in range(4):
        outbox.control(complete(str(number), "x" * (BATCH_BYTES // 2)))
    assert len(outbox.with_company(await outbox.next()).batch.messages) == 2


async def test_a_start_waits_for_its_end_and_not_longer(monkeypatch: Any) -> None:
    monkeypatch.setattr("fleet_agent.outbox.GATHER_SECONDS", 3600)
    outbox = Outbox()
    outbox.control(started("1"), soon=True)
    waiting = asyncio.create_task(outbox.next())
    for _ in range(5):
        await asyncio.sleep(0)
    assert not waiting.done()
    outbox.control(complete("1"))
    first = await asyncio.wait_for(waiting, 50)
    assert [one.WhichOneof("message") for one in outbox.with_company(first).batch.messages] == ["started", "complete"]


async def test_a_start_that_nothing_follows_goes_out_by_itself() -> None:
    outbox = Outbox()
    outbox.control(started("1"), soon=True)
    assert await asyncio.wait_for(outbox.next(), 50) == started("1")


async def test_no_tick_overtakes_the_start_of_its_attempt(monkeypatch: Any) -> None:
    monkeypatch.setattr("fleet_agent.outbox.GATHER_SECONDS", 3600)
    outbox = Outbox()
    outbox.control(started("1"), soon=True)
    outbox.tick(node_pb2.AgentMessage(tick=node_pb2.JobTick(token="1")))
    assert (await asyncio.wait_for(outbox.next(), 50)).HasField("started")
    assert (await asyncio.wait_for(outbox.next(), 50)).HasField("tick")


def test_a_free_payload_reaches_the_engine_as_json_has_it() -> None:
    payload = types_pb2.Payload()
    payload.custom.update({"a": [1, None, True, {"b": "x", "c": []}], "d": {"e": 1.5}, "f": None, "g": {}})
    for name, value in payload.custom.fields.items():
        assert _plain(value) == json_format.MessageToDict(value), name


async def test_an_agent_takes_what_the_server_says_in_one_batch(server: ScriptedServer, tmp_path: Path) -> None:
    async with agent_running(settings_of(tmp_path, server.address, slots=2)):
        talk = await server.conversation()
        assert talk.hello.batches
        messages = [node_pb2.ServerMessage(assign=assign_of(token)) for token in ("t1", "t2")]
        talk.say(batch=node_pb2.ServerBatch(messages=messages))
        await wait_until(lambda: {one.token for one in talk.all("complete")} >= {"t1", "t2"})
