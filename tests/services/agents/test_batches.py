"""Messages that travel together on the stream, and reports that go into the store together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fleet.v1 import node_pb2 as pb

from fleet_server.domain.errors import FleetError
from fleet_server.domain.job import JobState
from tests.services.agents.agent import ScriptedAgent, wait_until
from tests.services.agents.bench import Bench

OK = pb.CompleteOutcome.COMPLETE_OUTCOME_OK


async def test_what_an_agent_says_in_one_batch_is_heard_in_its_order(bench: Bench) -> None:
    agent = bench.agent()
    await agent.dial()
    job_id = await bench.submit()
    assign = await agent.take()
    token = assign.token
    messages = [
        pb.AgentMessage(accepted=pb.JobAccepted(job_id=job_id, token=token)),
        pb.AgentMessage(started=pb.JobStarted(job_id=job_id, token=token)),
        pb.AgentMessage(complete=pb.JobComplete(job_id=job_id, token=token, text="done")),
    ]
    await agent.send(batch=pb.AgentBatch(messages=messages))
    ack = (await agent.next("complete_ack")).complete_ack
    assert (ack.token, ack.outcome) == (token, OK)
    record = await bench.job(job_id)
    assert (record.state, record.started_ms is None) == (JobState.SUCCEEDED, False)


async def test_starts_and_ends_that_wait_go_to_the_store_together(bench: Bench) -> None:
    """One call for all starts, one for all ends; a start that is unwanted, and a failure, stand alone."""
    agent = bench.agent(slots=4)
    await agent.dial()
    ids = [await bench.submit() for _ in range(4)]
    assigns = [await agent.take() for _ in ids]
    calls: list[int] = []
    complete_many = bench.store.jobs.complete_many

    async def counted(reports: Sequence[Any]) -> Any:
        calls.append(len(reports))
        return await complete_many(reports)

    bench.store.jobs.complete_many = counted  # type: ignore[method-assign]
    messages = [
        pb.AgentMessage(started=pb.JobStarted(job_id=one.job_id, token=one.token))
        for one in (*assigns, pb.Assign(job_id=ids[0], token="0" * 32))
    ]
    messages += [pb.AgentMessage(complete=pb.JobComplete(job_id=one.job_id, token=one.token)) for one in assigns[:3]]
    failed = pb.JobComplete(job_id=assigns[3].job_id, token=assigns[3].token)
    failed.error.reason = "ENGINE_FAILED"
    messages.append(pb.AgentMessage(complete=failed))
    await agent.send(batch=pb.AgentBatch(messages=messages))
    acks = [(await agent.next("complete_ack")).complete_ack for _ in assigns]
    assert {ack.token: ack.outcome for ack in acks} == {one.token: OK for one in assigns}
    assert (await agent.next("cancel")).cancel.token == "0" * 32
    assert calls == [3]
    states = [(await bench.job(job_id)).state for job_id in ids]
    assert sorted(states) == [JobState.FAILED, *[JobState.SUCCEEDED] * 3]


def assigned(agent: ScriptedAgent) -> set[str]:
    """The jobs of every Assign so far, alone or in a batch."""
    messages = [one for message in agent.heard for one in (message, *message.batch.messages)]
    return {one.assign.job_id for one in messages if one.HasField("assign")}


async def test_an_agent_that_takes_batches_is_told_several_things_at_once(bench: Bench) -> None:
    ids = {await bench.submit() for _ in range(8)}
    agent = bench.agent(slots=8, batches=True)
    assert (await agent.dial()).batches
    await wait_until(lambda: assigned(agent) == ids)
    batches = [message for message in agent.heard if message.HasField("batch")]
    assert {message.session for message in batches} == {agent.session}
    assert sum(len(message.batch.messages) for message in batches) >= 2


async def test_an_agent_that_does_not_is_told_one_after_the_other(bench: Bench) -> None:
    ids = {await bench.submit() for _ in range(8)}
    agent = bench.agent(slots=8)
    await agent.dial()
    await wait_until(lambda: assigned(agent) == ids)
    assert not [message for message in agent.heard if message.HasField("batch")]
    assert {message.session for message in agent.heard} == {agent.session}


async def test_what_is_settled_is_not_settled_again_for_another_that_has_to_wait(bench: Bench) -> None:
    """A success and a failure come together, and the store is away for the failure alone."""
    agent = bench.agent(slots=2)
    await agent.dial()
    for _ in range(2):
        await bench.submit(max_retries=0)
    good, bad = [await agent.start() for _ in range(2)]
    fail, tries = bench.store.jobs.fail, 0

    async def away(*args: Any, **kwargs: Any) -> Any:
        nonlocal tries
        tries += 1
        if tries < 4:
            raise FleetError("STORE_UNAVAILABLE", "the store cannot be reached")
        return await fail(*args, **kwargs)

    bench.store.jobs.fail = away  # type: ignore[method-assign]
    failed = pb.JobComplete(job_id=bad.job_id, token=bad.token)
    failed.error.reason = "ENGINE_FAILED"
    messages = [pb.AgentMessage(complete=pb.JobComplete(job_id=good.job_id, token=good.token))]
    await agent.send(batch=pb.AgentBatch(messages=[*messages, pb.AgentMessage(complete=failed)]))
    acks = [(await agent.next("complete_ack")).complete_ack for _ in range(2)]
    assert [(ack.token, ack.outcome) for ack in acks] == [(good.token, OK), (bad.token, OK)]
    await agent.beat(slots=2)
    assert tries == 4
    assert not [message for message in agent.heard if message.HasField("complete_ack")]
