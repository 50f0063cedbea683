"""Which node is asked of those that manage the swarm, what is filled in, and which replica scales."""

from __future__ import annotations

import asyncio
import itertools
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import structlog
from fleet.v1 import command_pb2, fleet_pb2, types_pb2
from fleet.v1.node_pb2 import AgentHeartbeat, AgentMessage, Hello

from fleet_server.domain.errors import FleetError
from fleet_server.domain.job import Lane
from fleet_server.domain.node import NodeStatus
from fleet_server.services.audit import Actor
from fleet_server.services.autoscaler import Autoscaler, AutoscaleSettings
from fleet_server.services.fleet import FleetView
from fleet_server.services.swarm import Swarm, SwarmSettings
from fleet_server.services.swarm_news import SwarmNews
from fleet_server.store import NodeRow, Store, open_store
from tests.store.conftest import Server, run_server
from tests.store.making import new_job
from tests.waiting import wait_until

_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def valkey() -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix="fleet-", dir="/tmp") as folder:
        yield from run_server(Path(folder), cluster=False)


@pytest.fixture
async def store(valkey: Server) -> AsyncIterator[Store]:
    async with open_store(valkey.url, namespace=f"w{next(_numbers)}") as opened:
        yield opened


def service(**fields: Any) -> types_pb2.SwarmService:
    given = {"service_id": "x3ti", "name": "sdxl", "mode": "replicated", "replicas": 1, "version": 5}
    return types_pb2.SwarmService(**{**given, **fields})


class Nodes:
    """Stands where commands are sent to nodes: each answers as the test says, and what it was sent is noted."""

    def __init__(self) -> None:
        self.fleet = FleetView()
        self.refusals: dict[str, str] = {}
        self.asked: list[tuple[str, command_pb2.Command]] = []
        self.service = service()

    def join(self, node_id: str, role: str, **fields: Any) -> None:
        hello = Hello(node_id=node_id, hostname=f"host-{node_id}", swarm_role=role, slots=1, **fields)
        row = NodeRow(node_id, hello.SerializeToString())
        self.fleet.connected(row, hello, AgentHeartbeat(slots=1), address="", slots_free=1)

    def _judge(self, node_id: str, command: command_pb2.Command) -> None:
        self.asked.append((node_id, command))
        if node_id in self.refusals:
            raise FleetError(self.refusals[node_id], f"said {node_id}")

    async def run(self, node_id: str, command: command_pb2.Command, **_: float) -> command_pb2.CommandEnd:
        self._judge(node_id, command)
        if command.HasField("list_services"):
            return command_pb2.CommandEnd(services=command_pb2.SwarmServices(services=[self.service]))
        if command.HasField("scale_service"):
            self.service.replicas = command.scale_service.replicas
        return command_pb2.CommandEnd(service=self.service)

    @asynccontextmanager
    async def open(self, node_id: str, command: command_pb2.Command) -> AsyncIterator[Any]:
        self._judge(node_id, command)

        async def parts() -> AsyncIterator[command_pb2.ServeCommandRequest]:
            for number in range(1_000):
                line = types_pb2.LogLine(text=f"{number:04} {'x' * 100}")
                yield command_pb2.ServeCommandRequest(line=line)
                if self.refusals.get("while reading") and number == 2:
                    raise FleetError("NODE_OFFLINE", "gone")
            yield command_pb2.ServeCommandRequest(end=command_pb2.CommandEnd())

        yield parts()

    @property
    def names(self) -> list[str]:
        return [node_id for node_id, _ in self.asked]


@pytest.fixture
def nodes() -> Nodes:
    made = Nodes()
    made.join("worker", "worker")
    made.join("none", "")
    return made


@pytest.fixture
def swarm(nodes: Nodes, store: Store) -> Swarm:
    return Swarm(nodes.fleet, nodes, store.swarm, store.replies, SwarmSettings(log_bytes=20_000))  # type: ignore[arg-type]


def scale(replicas: int = 2) -> fleet_pb2.ScaleServiceRequest:
    return fleet_pb2.ScaleServiceRequest(service_id="sdxl", replicas=replicas)


async def test_no_node_manages_a_swarm(swarm: Swarm, nodes: Nodes) -> None:
    nodes.join("away", "manager")
    nodes.fleet.set_status("away", NodeStatus.DISCONNECTED)
    for call in (swarm.services(), swarm.service("sdxl"), swarm.scale(scale())):
        with pytest.raises(FleetError) as caught:
            await call
        assert caught.value.reason == "NOT_SWARM_MANAGER"
    with pytest.raises(FleetError, match="no online node manages"):
        await anext(swarm.follow(fleet_pb2.StreamServiceLogsRequest(service_id="sdxl")))
    assert nodes.asked == []


@pytest.mark.parametrize("reason", ["NODE_OFFLINE", "NOT_SWARM_MANAGER", "DOCKER_UNAVAILABLE"])
async def test_another_manager_is_asked_where_nothing_was_done(swarm: Swarm, nodes: Nodes, reason: str) -> None:
    nodes.join("a", "manager")
    nodes.join("b", "manager")
    nodes.refusals["a"] = reason
    assert (await swarm.scale(scale(3))).replicas == 3
    assert len(await swarm.log(fleet_pb2.GetServiceLogsRequest(service_id="sdxl"))) > 100
    assert nodes.names == ["a", "b", "a", "b"]


@pytest.mark.parametrize("reason", ["OUTCOME_UNKNOWN", "TIMEOUT", "SERVICE_NOT_FOUND"])
async def test_no_other_is_asked_where_something_may_have_been(swarm: Swarm, nodes: Nodes, reason: str) -> None:
    nodes.join("a", "manager")
    nodes.join("b", "manager")
    nodes.refusals["a"] = reason
    with pytest.raises(FleetError) as caught:
        await swarm.rollback(fleet_pb2.RollbackServiceRequest(service_id="sdxl"))
    assert caught.value.reason == reason
    assert nodes.names == ["a"]


async def test_a_log_that_breaks_is_not_begun_again(swarm: Swarm, nodes: Nodes) -> None:
    nodes.join("a", "manager")
    nodes.join("b", "manager")
    nodes.refusals["while reading"] = "yes"
    lines = swarm.follow(fleet_pb2.StreamServiceLogsRequest(service_id="sdxl"))
    seen = [(await anext(lines)).text[:4] for _ in range(3)]
    with pytest.raises(FleetError, match="gone"):
        await anext(lines)
    assert (seen, nodes.names) == (["0000", "0001", "0002"], ["a"])


async def test_a_long_log_is_its_newest_part(swarm: Swarm, nodes: Nodes) -> None:
    nodes.join("a", "manager")
    lines = await swarm.log(fleet_pb2.GetServiceLogsRequest(service_id="sdxl"))
    assert lines[-1].text.startswith("0999")
    assert 18_000 < sum(line.ByteSize() for line in lines) <= 20_000


async def test_a_repeated_request_is_one_command(swarm: Swarm, nodes: Nodes) -> None:
    nodes.join("a", "manager")
    first = await swarm.scale(scale(2), Actor("me", key="k"))
    assert await swarm.scale(scale(2), Actor("me", key="k")) == first
    await swarm.scale(scale(2), Actor("you", key="k"))
    [mine, yours] = [command.command_id for _, command in nodes.asked]
    assert mine and yours and mine != yours
    with pytest.raises(FleetError) as caught:
        await swarm.scale(scale(3), Actor("me", key="k"))
    assert caught.value.reason == "IDEMPOTENCY_KEY_REUSED"
    # What failed is not remembered, and is tried again under another identity.
    nodes.refusals["a"] = "SERVICE_NOT_FOUND"
    for _ in range(2):
        with pytest.raises(FleetError):
            await swarm.scale(scale(2), Actor("me", key="other"))
    assert len({command.command_id for _, command in nodes.asked}) == 4


async def test_tasks_are_on_the_fleets_nodes(swarm: Swarm, nodes: Nodes) -> None:
    nodes.join("a", "manager", swarm_node_id="s1")
    nodes.join("b", "worker", swarm_node_id="s2")
    tasks = [
        types_pb2.ServiceTask(task_id="1", node_id="s1", hostname="x"),
        types_pb2.ServiceTask(task_id="2", node_id="s2", hostname="host-a"),
        # Known by its host alone; of a machine that is no node; not given to a machine yet.
        types_pb2.ServiceTask(task_id="3", node_id="s3", hostname="host-worker"),
        types_pb2.ServiceTask(task_id="4", node_id="s4", hostname="elsewhere"),
        types_pb2.ServiceTask(task_id="5"),
    ]
    nodes.service = service(tasks=tasks)
    found = (await swarm.service("sdxl")).tasks
    names = [task.node_id if task.HasField("node_id") else None for task in found]
    assert names == ["a", "b", "worker", None, None]


async def told(store: Store) -> list[types_pb2.SwarmService]:
    events, _ = await store.events.read("0")
    return [types_pb2.SwarmService.FromString(one.fields["service"]) for one in events if one.type == "service_update"]


async def test_what_two_managers_see_is_told_once(swarm: Swarm, nodes: Nodes, store: Store) -> None:
    nodes.join("a", "manager", swarm_node_id="s1")
    news = SwarmNews(swarm, store.swarm)
    running = asyncio.create_task(news.run())
    try:
        for version in (5, 5, 6, 4):
            task = types_pb2.ServiceTask(task_id="1", node_id="s1")
            for node_id in ("a", "b"):
                news.take(node_id, AgentMessage(service=service(version=version, tasks=[task])))
            await wait_until(lambda: not news._waiting and not news._some.is_set())
        news.take("a", AgentMessage(service=service(service_id="last")))

        async def ended() -> bool:
            return bool(found := await told(store)) and found[-1].service_id == "last"

        await wait_until(ended)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    found = await told(store)
    assert [(one.service_id, one.version) for one in found] == [("x3ti", 5), ("x3ti", 6), ("last", 5)]
    assert found[0].tasks[0].node_id == "a"


class Scalers:
    """Replicas that scale one service."""

    def __init__(self, swarm: Swarm, store: Store) -> None:
        self.now = 0.0
        news = SwarmNews(swarm, store.swarm)
        self.replicas = [
            Autoscaler(
                swarm,
                news,
                store.swarm,
                store.jobs,
                replica=name,
                clock=lambda: self.now,
                real_name=lambda name, _: {"alias": "sdxl"}.get(name, name),
                settings=AutoscaleSettings(look_seconds=5, calm_seconds=60),
            )
            for name in ("one", "two")
        ]

    async def look(self, which: int = 0) -> None:
        await self.replicas[which]._look()


async def test_a_service_is_scaled_by_one_replica(swarm: Swarm, nodes: Nodes, store: Store) -> None:
    nodes.join("a", "manager")
    scalers = Scalers(swarm, store)
    rule = fleet_pb2.AutoscaleServiceRequest(
        service_id="sdxl", enabled=True, max_replicas=4, min_replicas=1, jobs_per_replica=2, target_model="alias"
    )
    found = await scalers.replicas[1].set_rule(rule)
    assert found.autoscale.target_model == "alias"
    assert [one.autoscale.max_replicas for one in await told(store)] == [4]
    for model in ["sdxl"] * 6 + ["flux"]:
        await store.jobs.submit([new_job(lane=Lane(f"lane-{model}", "vision", "image_gen", model))])
    await scalers.look(0)
    assert nodes.service.replicas == 3
    nodes.service.replicas = 1
    await scalers.look(1)
    assert nodes.service.replicas == 1
    await scalers.look(0)
    assert nodes.service.replicas == 3


async def test_the_rule_of_a_service_that_is_gone_goes(swarm: Swarm, nodes: Nodes, store: Store) -> None:
    scalers = Scalers(swarm, store)
    for name in ("x3ti", "gone"):
        await store.swarm.set_rule(
            name, types_pb2.Autoscale(enabled=True, max_replicas=1, jobs_per_replica=1).SerializeToString()
        )
    # Nobody can say which services there are.
    await scalers.look()
    assert set(await store.swarm.rules()) == {"x3ti", "gone"}
    nodes.join("a", "manager")
    await scalers.look()
    assert set(await store.swarm.rules()) == {"x3ti"}


async def test_changes_are_in_the_audit_log(swarm: Swarm, nodes: Nodes) -> None:
    nodes.join("a", "manager")
    auth = fleet_pb2.RegistryAuth(username="u", password="hidden")
    with structlog.testing.capture_logs() as logs:
        await swarm.scale(scale(3), Actor("me", "r1"))
        nodes.refusals["a"] = "IMAGE_NOT_FOUND"
        with pytest.raises(FleetError):
            asked = fleet_pb2.UpdateServiceRequest(service_id="sdxl", image="x:1", registry_auth=auth)
            await swarm.update(asked, Actor("you", "r2"))
    found = [(one["verb"], one["owner"], one["request_id"], one["service"], one["decision"]) for one in logs]
    assert found == [
        ("scale_service", "me", "r1", "sdxl", "done"),
        ("update_service", "you", "r2", "sdxl", "IMAGE_NOT_FOUND"),
    ]
    assert "hidden" not in str(logs)
