"""Cordon, drain, labels and deletion: facts in the store that placement sees at once."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from fleet.v1 import command_pb2, fleet_pb2, types_pb2
from fleet.v1 import node_pb2 as pb
from google.protobuf.struct_pb2 import ListValue, Struct

from fleet_server.domain.errors import FleetError
from fleet_server.domain.job import JobState
from fleet_server.services.machines import Machines
from fleet_server.store import NodeRow, decode_node
from tests.services.agents.agent import ScriptedAgent, wait_until
from tests.services.agents.bench import Bench

ENGINE: dict[str, Any] = {"docker_version": "20.10.24"}


def machines(bench: Bench) -> Machines:
    return Machines(bench.store.nodes, bench.fleet)


async def node(agent: ScriptedAgent, node_id: str = "agx0") -> types_pb2.NodeInfo:
    return next(one for one in await agent.nodes() if one.node_id == node_id)


async def states(bench: Bench, *job_ids: str) -> list[str]:
    return [(await bench.job(one)).state.value for one in job_ids]


async def test_a_cordoned_node_keeps_its_work_and_gets_no_more(bench: Bench) -> None:
    agent = bench.agent(slots=2)
    await agent.dial()
    first = await bench.submit()
    assign = await agent.start()
    reply = await agent.stub.CordonNode(pb.CordonNodeRequest(node_id="agx0"))
    assert reply.node.cordoned
    assert not reply.node.HasField("drain")
    second = await bench.submit()
    await agent.complete(assign)
    assert await states(bench, first, second) == ["succeeded", "queued"]
    other = bench.agent("agx1")
    await other.dial()
    assert (await other.take()).job_id == second
    third = await bench.submit()
    assert not (await agent.stub.UncordonNode(pb.UncordonNodeRequest(node_id="agx0"))).node.cordoned
    assert (await agent.take()).job_id == third


async def test_no_replica_claims_for_a_node_that_another_has_cordoned(bench: Bench) -> None:
    """The replica with the stream has not heard of it yet: the store says no."""
    agent = bench.agent()
    await agent.dial()
    assert await bench.store.nodes.set_cordoned("agx0", True) is not None
    view = bench.fleet.node("agx0")
    assert view is not None and not view.cordoned
    job = await bench.submit()
    for _ in range(3):
        await bench.dispatcher.round()
    assert (await bench.job(job)).state is JobState.QUEUED
    assert await bench.store.nodes.set_cordoned("agx0", False) is not None
    assert (await agent.take()).job_id == job


async def test_the_other_replicas_event_reaches_placement_here(bench: Bench) -> None:
    agent = bench.agent()
    await agent.dial()
    row = await bench.store.nodes.set_cordoned("agx0", True)
    assert row is not None
    bench.sessions.told(row)
    assert (await node(agent)).cordoned
    stale = await bench.store.nodes.set_cordoned("agx0", False)
    assert stale is not None
    bench.sessions.told(stale)
    bench.sessions.told(row)
    assert not (await node(agent)).cordoned, "what is older changes nothing"


async def test_a_new_node_is_online_with_its_stream_and_no_sooner(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store's word of it may be heard before the stream is open: who asks then must not be told to deploy there."""
    get, heard, go = bench.store.nodes.get, asyncio.Event(), asyncio.Event()

    async def held(node_id: str) -> NodeRow | None:
        row = await get(node_id)
        if row is not None:
            heard.set()
            await go.wait()
        return row

    monkeypatch.setattr(bench.store.nodes, "get", held)
    dialling = asyncio.create_task(bench.agent().dial())
    await heard.wait()
    row = await get("agx0")
    assert row is not None and row.status == "online"
    bench.sessions.told(row)
    assert bench.fleet.node("agx0") is None
    go.set()
    await dialling
    view = bench.fleet.node("agx0")
    assert view is not None and view.online


async def test_a_drain_waits_for_the_work_and_says_when_it_has_stopped(bench: Bench) -> None:
    agent = bench.agent()
    await agent.dial()
    await bench.submit()
    assign = await agent.start()
    drained = (await agent.stub.DrainNode(pb.DrainNodeRequest(node_id="agx0", containers=False))).node
    assert drained.cordoned
    assert (drained.drain.remaining_jobs, drained.drain.done) == (1, False)
    wait = drained.drain.deadline_time.ToMilliseconds() - drained.drain.start_time.ToMilliseconds()
    assert wait == 3_600_000
    await agent.beat([(assign.job_id, assign.token)])
    assert not (await node(agent)).drain.done
    await agent.complete(assign)

    async def done() -> bool:
        return (await node(agent)).drain.done

    await wait_until(done, "the drain's end")
    assert (await node(agent)).drain.remaining_jobs == 0
    events, _ = await bench.store.events.read("0")
    rows = [decode_node(event.fields) for event in events if event.type == "node_update"]
    assert [row.drain_done for row in rows if row.draining][-1]
    await agent.stub.UncordonNode(pb.UncordonNodeRequest(node_id="agx0"))
    assert not (await node(agent)).HasField("drain")


async def test_at_the_deadline_jobs_go_elsewhere_uncounted_and_done_waits_for_the_slot(bench: Bench) -> None:
    agent, other = bench.agent(), bench.agent("agx1")
    await agent.dial()
    job = await bench.submit(max_retries=0)
    assign = await agent.start()
    await other.dial()
    await agent.stub.DrainNode(pb.DrainNodeRequest(node_id="agx0", deadline_seconds=0, containers=False))
    again = await other.start()
    assert again.job_id == job
    record = await bench.job(job)
    assert (record.attempt, record.losses, record.node_id) == (1, 0, "agx1")
    assert (await agent.next("cancel")).cancel.token == assign.token
    info = await node(agent)
    assert (info.drain.remaining_jobs, info.drain.done) == (1, False), "its engine still runs"
    await agent.send(stopped=pb.JobStopped(job_id=job, token=assign.token))

    async def done() -> bool:
        return (await node(agent)).drain.done

    await wait_until(done, "the drain's end")
    assert await other.complete(again) == pb.COMPLETE_OUTCOME_OK


async def test_a_drain_outlasts_the_connection_and_is_never_done_without_the_agents_word(bench: Bench) -> None:
    agent, watcher = bench.agent(), bench.agent("agx1")
    await agent.dial()
    await bench.submit()
    await agent.start()
    await agent.send(goodbye=pb.AgentGoodbye())
    await agent.finish()
    await wait_until(lambda: bench.status_is("down"), "the goodbye is written down")
    await machines(bench).drain("agx0", 3600, containers=False)
    for _ in range(20):
        # Looks come with changes; each of these gives one the time to be written down.
        bench.fleet.touch("agx0")
        assert not (await node(watcher)).drain.done, "nobody knows what still runs there"
    await agent.dial(instance_id="boot-2")

    async def done() -> bool:
        return (await node(watcher)).drain.done

    await wait_until(done, "the drain's end")


async def test_containers_hold_a_drain_up_until_they_have_stopped(bench: Bench) -> None:
    agent = bench.agent(**ENGINE)
    await agent.dial()
    await agent.beat(managed_containers=2, **ENGINE)
    await agent.stub.DrainNode(pb.DrainNodeRequest(node_id="agx0", deadline_seconds=0))
    command = (await agent.next("command")).command
    assert command.WhichOneof("command") == "list_containers", "which are the fleet's own"
    await agent.beat(managed_containers=2, **ENGINE)

    async def left(count: int) -> bool:
        drain = (await node(agent)).drain
        return drain.remaining_containers == count and drain.done == (count == 0)

    await wait_until(lambda: left(2), "two left")
    # An agent that was started anew while its engine is away has seen none: that says nothing.
    await agent.hang_up()
    await agent.dial(instance_id="boot-2", docker_version="")
    await agent.beat(managed_containers=0)
    await looks(bench)
    assert await left(2)
    await agent.beat(managed_containers=0, **ENGINE)
    await wait_until(lambda: left(0), "the drain's end")


async def looks(bench: Bench, node_id: str = "agx0") -> None:
    """Gives drains the time to look, and to write down what they see."""
    for _ in range(20):
        bench.fleet.touch(node_id)
        await bench.store.nodes.get(node_id)


async def test_a_deploy_under_way_holds_a_drain_up_and_a_new_one_is_refused(bench: Bench) -> None:
    agent = bench.agent(**ENGINE)
    await agent.dial()

    def deploy() -> Any:
        request = fleet_pb2.DeployContainerRequest(node_id="agx0", image="app:1", name="app")
        return bench.commands.run("agx0", command_pb2.Command(deploy=request), timeout=100)

    async def done() -> bool:
        return (await node(agent)).drain.done

    pulls = asyncio.create_task(deploy())
    await agent.next("command")
    await agent.stub.DrainNode(pb.DrainNodeRequest(node_id="agx0"))
    # The agent has not begun it when it says that nothing runs.
    for _ in range(2):
        await agent.beat(managed_containers=0, **ENGINE)
        await looks(bench)
        assert not await done()
    with pytest.raises(FleetError) as refused:
        await deploy()
    assert refused.value.reason == "NO_NODE"
    pulls.cancel()
    await asyncio.gather(pulls, return_exceptions=True)
    await looks(bench)
    assert not await done(), "what came of it is known from the next word of the agent"
    await agent.beat(managed_containers=0, **ENGINE)
    await wait_until(done, "the drain's end")
    await agent.stub.UncordonNode(pb.UncordonNodeRequest(node_id="agx0"))
    again = asyncio.create_task(deploy())
    await agent.next("command")
    again.cancel()


async def test_labels_and_clusters_are_replaced_as_a_whole_and_outlast_the_agents_own(bench: Bench) -> None:
    agent = bench.agent(labels={"zone": "a", "rack": "1"}, clusters=["vision"])
    await agent.dial()
    job = await bench.submit(target_labels={"zone": "b"})
    changes = Struct()
    changes.update({"zone": "b"})
    info = (await agent.stub.UpdateNode(pb.UpdateNodeRequest(node_id="agx0", labels=changes))).node
    assert dict(info.labels) == {"zone": "b"}
    assert list(info.clusters) == ["vision"], "what is not given stays"
    assert (await agent.take()).job_id == job
    clusters = ListValue()
    clusters.extend(["lab", "vision"])
    await agent.stub.UpdateNode(pb.UpdateNodeRequest(node_id="agx0", clusters=clusters))
    await agent.hang_up()
    await agent.dial()
    info = await node(agent)
    assert (dict(info.labels), list(info.clusters)) == ({"zone": "b"}, ["lab", "vision"])
    await agent.stub.UpdateNode(pb.UpdateNodeRequest(node_id="agx0", labels=Struct()))
    assert dict((await node(agent)).labels) == {}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({}, "clusters"),
        ({"clusters": ["Vision"]}, "clusters[0]"),
        ({"clusters": ["a", 7.0]}, "clusters[1]"),
        ({"labels": {"zone": 3.0}}, "labels.zone"),
        ({"labels": {"bad name": "x"}}, "labels.bad name"),
        ({"labels": {"zone": "x" * 256}}, "labels.zone"),
    ],
)
async def test_bad_descriptions_are_refused_by_name(bench: Bench, fields: dict[str, Any], named: str) -> None:
    await bench.agent().dial()
    with pytest.raises(FleetError, match="must be") as refused:
        await machines(bench).update("agx0", clusters=fields.get("clusters"), labels=fields.get("labels"))
    assert refused.value.violations[0].field == named


async def test_a_node_is_deleted_only_while_it_is_away(bench: Bench) -> None:
    agent, other = bench.agent(), bench.agent("agx1")
    await agent.dial()
    await other.dial()
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await other.stub.DeleteNode(pb.DeleteNodeRequest(node_id="agx0"))
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    await agent.hang_up()
    await wait_until(lambda: bench.status_is("disconnected"), "the loss is written down")
    gone = (await other.stub.DeleteNode(pb.DeleteNodeRequest(node_id="agx0"))).node
    assert gone.status == types_pb2.NODE_STATUS_DISCONNECTED
    assert [one.node_id for one in await other.nodes()] == ["agx1"]
    events, _ = await bench.store.events.read("0")
    last = decode_node(events[-1].fields)
    assert (last.node_id, last.deleted) == ("agx0", True)
    bench.sessions.told(last)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await other.stub.CordonNode(pb.CordonNodeRequest(node_id="agx0"))
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND


async def test_the_last_hour_comes_oldest_first_a_beat_a_step_and_in_pages(bench: Bench) -> None:
    agent = bench.agent()
    await agent.dial()
    for percent in (10, 20, 30):
        await agent.beat(host=types_pb2.Host(cpu_percent=percent))
    reply = await agent.stub.ListNodeHeartbeats(pb.ListNodeHeartbeatsRequest(node_id="agx0", step_seconds=600))
    assert 1 <= len(reply.heartbeats) <= 2
    assert reply.heartbeats[-1].host.cpu_percent == 30
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await agent.stub.ListNodeHeartbeats(pb.ListNodeHeartbeatsRequest(node_id="nobody"))
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND
