"""What the agent does with its engine's swarm, on a real engine; and on one whose words are lost."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import docker
import pytest
from fleet.v1 import fleet_pb2, types_pb2

from fleet_agent.commands.faults import CommandFault
from fleet_agent.docker_engine import DockerEngine
from fleet_agent.swarm.logs import ServiceLogs
from fleet_agent.swarm.manager import SwarmManager
from fleet_agent.swarm.watch import MOST_TASKS, REMOVED, SwarmWatch
from tests.docker_daemon import IMAGE, DockerDaemon, docker_daemon
from tests.swarm.cut import Wire, wire
from tests.waiting import wait_until

FOREVER = ["/bin/sh", "-c", "exec sleep 100000"]


@pytest.fixture(scope="module")
def daemon() -> Iterator[DockerDaemon]:
    with tempfile.TemporaryDirectory(prefix="fm-", dir="/tmp") as folder, docker_daemon(Path(folder) / "d") as made:
        with contextlib.closing(made.client()) as client:
            client.swarm.init(advertise_addr=made.address, listen_addr=f"{made.address}:2377")
        yield made


@pytest.fixture
def client(daemon: DockerDaemon) -> Iterator[docker.DockerClient]:
    with contextlib.closing(daemon.client()) as opened:
        yield opened
        made: Any = opened.services.list()
        for service in made:
            service.remove()


@pytest.fixture
async def line(daemon: DockerDaemon, short_path: Path) -> AsyncIterator[Wire]:
    async with wire(daemon.socket, short_path / "w") as made:
        yield made


@pytest.fixture
async def engine(line: Wire, short_path: Path) -> AsyncIterator[DockerEngine]:
    made = DockerEngine(f"unix://{short_path / 'w'}", timeout_seconds=10)
    yield made
    await made.close()


@pytest.fixture
def manager(engine: DockerEngine) -> SwarmManager:
    return SwarmManager(engine)


def create(client: docker.DockerClient, name: str, replicas: int = 1, command: Any = FOREVER, **fields: Any) -> Any:
    mode = docker.types.ServiceMode("replicated", replicas=replicas)
    return client.services.create(IMAGE, command, name=name, mode=mode, stop_grace_period=1_000_000, **fields)  # type: ignore[no-untyped-call]


def spec_of(client: docker.DockerClient, service_id: str) -> Any:
    made: Any = client.services.get(service_id)  # type: ignore[no-untyped-call]
    return made.attrs["Spec"]


async def running(manager: SwarmManager, name: str, count: int = 1) -> types_pb2.SwarmService:
    async def enough() -> types_pb2.SwarmService | None:
        service = await manager.service(name)
        return service if service.running_replicas == count else None

    return await wait_until(enough)


async def test_scaling_changes_nothing_else(manager: SwarmManager, client: docker.DockerClient) -> None:
    ports: Any = {"TargetPort": 80, "PublishedPort": 8080, "PublishMode": "host"}
    made = create(
        client,
        "whole",
        env=["A=1"],
        labels={"tier": "gpu"},
        mounts=["/tmp:/host:ro"],
        healthcheck=docker.types.Healthcheck(test=["CMD", "true"], interval=10**9),
        restart_policy=docker.types.RestartPolicy("on-failure", max_attempts=3),
        resources=docker.types.Resources(mem_limit=64 << 20),
        endpoint_spec=docker.types.EndpointSpec(ports=[ports]),
        constraints=["node.role==manager"],
    )
    before = await running(manager, "whole")
    spec = spec_of(client, made.id)
    assert (await manager.scale("whole", 2)).replicas == 2
    after = spec_of(client, made.id)
    assert after["Mode"] == {"Replicated": {"Replicas": 2}}
    assert {**after, "Mode": None} == {**spec, "Mode": None}
    assert [(port.port, port.host_port, port.publish_mode) for port in before.ports] == [(80, 8080, "host")]
    # One port on one machine: the second task waits, the first is the one that was.
    now = await manager.service("whole")
    assert before.tasks[0].task_id in {task.task_id for task in now.tasks if task.status == "running"}


async def test_scaling_to_what_is_changes_nothing(
    manager: SwarmManager, client: docker.DockerClient, line: Wire
) -> None:
    create(client, "same", replicas=2)
    before = await running(manager, "same", 2)
    line.counted = b"/update?"
    assert (await manager.scale("same", 2)).version == before.version
    assert line.passed == 0


async def test_others_were_quicker(
    manager: SwarmManager, client: docker.DockerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    create(client, "raced", labels={"n": "0"})
    inspect = manager.inspect
    races = 0

    async def outrun(service_id: str) -> Any:
        nonlocal races
        attrs = await inspect(service_id)
        if races < 3:
            races += 1
            service: Any = client.services.get("raced")  # type: ignore[no-untyped-call]
            await asyncio.to_thread(
                client.api.post,
                f"{client.api.base_url}/v{client.api.api_version}/services/{service.id}/update",
                params={"version": service.attrs["Version"]["Index"]},
                json={**service.attrs["Spec"], "Labels": {"n": str(races)}},
            )
        return attrs

    monkeypatch.setattr(manager, "inspect", outrun)
    service = await manager.scale("raced", 0)
    # What they changed stays changed.
    assert (races, service.replicas, dict(service.labels)) == (3, 0, {"n": "3"})


async def test_a_lost_reply_is_not_taken_for_a_failure(
    manager: SwarmManager, client: docker.DockerClient, line: Wire
) -> None:
    create(client, "lost")
    await manager.scale("lost", 2)
    line.counted = line.deaf_to = b"rollback=previous"
    with pytest.raises(CommandFault) as caught:
        await manager.rollback("lost")
    assert (caught.value.reason, caught.value.acted) == ("OUTCOME_UNKNOWN", True)
    # It was done, once.
    assert (await manager.service("lost")).replicas == 1
    assert line.passed == 1


# Docker's library leaves the socket of a connection that was refused to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_an_engine_that_is_away_and_comes_back(daemon: DockerDaemon, short_path: Path) -> None:
    path = short_path / "later"
    engine = DockerEngine(f"unix://{path}", timeout_seconds=10)
    manager = SwarmManager(engine)
    with pytest.raises(CommandFault) as caught:
        await manager.services()
    assert (caught.value.reason, caught.value.acted) == ("DOCKER_UNAVAILABLE", False)
    assert str(path) in caught.value.detail and "No such file" in caught.value.detail
    assert (await engine.look()).swarm_role == ""
    async with wire(daemon.socket, path):
        assert await manager.services() == []
        assert (await engine.look()).swarm_role == "manager"
        assert engine.facts.swarm_node_id
    with pytest.raises(CommandFault, match="does not answer"):
        await manager.scale("x", 1)
    await engine.close()
    del caught
    gc.collect()


async def lines_of(logs: ServiceLogs, name: str, **fields: Any) -> list[types_pb2.LogLine]:
    request = fleet_pb2.StreamServiceLogsRequest(service_id=name, **{"tail": 100, "follow": False, **fields})
    async with aclosing(logs.lines(request)) as lines:
        return [line async for line in lines]


ODD = r"echo 'a  b '; echo; printf 'grün\nlast'; head -c 40000 /dev/zero | busybox tr '\0' x; echo; exec sleep 100000"


@pytest.mark.parametrize("tty", [False, True])
async def test_odd_lines_are_kept_as_they_are(
    engine: DockerEngine, manager: SwarmManager, client: docker.DockerClient, tty: bool
) -> None:
    create(client, "odd", command=["/bin/sh", "-c", ODD], tty=tty)
    service = await running(manager, "odd")
    logs = ServiceLogs(engine, manager)

    async def whole() -> list[types_pb2.LogLine] | None:
        found = await lines_of(logs, "odd")
        return found if sum(len(line.text) for line in found) >= 40_013 else None

    found = await wait_until(whole)
    assert [line.text for line in found[:3]] == ["a  b ", "", "grün"]
    # A very long line comes in parts, and nothing of it is lost.
    assert "".join(line.text for line in found[3:]) == "last" + "x" * 40_000
    assert {line.task_id for line in found} == {service.tasks[0].task_id}
    assert {line.stream for line in found} == {"stdout"}
    assert all(line.time.seconds for line in found)


async def test_a_reader_who_leaves_ends_an_endless_log(
    engine: DockerEngine, manager: SwarmManager, client: docker.DockerClient
) -> None:
    create(client, "endless", command=["/bin/sh", "-c", "while true; do echo y; sleep 0.002; done"])
    await running(manager, "endless")
    logs = ServiceLogs(engine, manager)
    request = fleet_pb2.StreamServiceLogsRequest(service_id="endless", tail=3, follow=True)
    async with aclosing(logs.lines(request)) as lines:
        seen = [await anext(lines) for _ in range(300)]
    assert [line.text for line in seen] == ["y"] * 300
    times = [line.time.ToNanoseconds() for line in seen]
    assert times == sorted(times)


async def test_a_log_that_ends_at_a_time(
    engine: DockerEngine, manager: SwarmManager, client: docker.DockerClient
) -> None:
    create(client, "timed", command=["/bin/sh", "-c", "while true; do echo tick; sleep 0.1; done"])
    await running(manager, "timed")
    logs = ServiceLogs(engine, manager)
    request = fleet_pb2.StreamServiceLogsRequest(service_id="timed", tail=1, follow=True)
    request.until.GetCurrentTime()
    request.until.seconds += 1
    async with aclosing(logs.lines(request)) as lines:
        times = [line.time.ToNanoseconds() async for line in lines]
    assert times
    assert max(times) < request.until.ToNanoseconds()


class Told:
    """Where a watch tells its changes; deaf at will."""

    def __init__(self) -> None:
        self.services: list[types_pb2.SwarmService] = []
        self.unheard: list[types_pb2.SwarmService] = []
        self.deaf = False

    def __call__(self, service: types_pb2.SwarmService) -> bool:
        (self.unheard if self.deaf else self.services).append(service)
        return not self.deaf

    async def when(self, name: str, right: Callable[[types_pb2.SwarmService], bool]) -> types_pb2.SwarmService:
        """The service as it was told last, once that is right."""

        def last() -> types_pb2.SwarmService | None:
            found = next((one for one in reversed(self.services) if one.name == name), None)
            return found if found is not None and right(found) else None

        return await wait_until(last)


async def test_changes_are_told_until_they_are_heard(
    engine: DockerEngine, manager: SwarmManager, client: docker.DockerClient
) -> None:
    told = Told()
    watch = SwarmWatch(engine, manager, told, seconds=0.2, gather_seconds=0.01)
    task = asyncio.create_task(watch.run())
    try:
        told.deaf = True
        service = create(client, "watched")
        await wait_until(lambda: any(one.running_replicas == 1 for one in told.unheard))
        told.deaf = False
        await told.when("watched", lambda one: one.running_replicas == 1)
        count = len(told.services)
        watch.told_nothing()
        await wait_until(lambda: len(told.services) == count + 1)
        assert told.services[-1] == told.services[-2]
        told.deaf = True
        await asyncio.to_thread(service.remove)
        await wait_until(lambda: told.unheard[-1].update.status == REMOVED)
        told.deaf = False
        gone = await told.when("watched", lambda one: one.update.status == REMOVED)
        assert (gone.running_replicas, len(gone.tasks)) == (0, 0)
        # Tasks that no node may run: so many containers are not what this is about.
        create(client, "many", replicas=0, constraints=["node.hostname==nowhere"])
        await manager.scale("many", MOST_TASKS + 20)
        many = await told.when("many", lambda one: len(one.tasks) >= MOST_TASKS)
        assert (many.replicas, len(many.tasks)) == (MOST_TASKS + 20, MOST_TASKS)
        await manager.scale("many", 0)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled()
