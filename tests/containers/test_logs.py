"""Logs of containers: the last lines, and what comes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import docker
import grpc
import httpx
import pytest
from fleet.v1 import fleet_pb2, fleet_pb2_grpc

from fleet_agent.containers.containers import Containers
from fleet_agent.containers.logs import ContainerLogs
from fleet_agent.containers.mounts import MountPolicy
from fleet_agent.docker_engine import DockerEngine
from tests.containers.conftest import NODE
from tests.docker_daemon import IMAGE, DockerDaemon
from tests.e2e.fleet_process import FleetProcess
from tests.waiting import wait_until

pytestmark = pytest.mark.usefixtures("clean")
PATH = f"/api/fleet/logs/{NODE}/writer"


def deploy(door: httpx.Client, command: str, **fields: Any) -> None:
    body = {"node_id": NODE, "image": IMAGE, "name": "writer", "command": command, "restart_policy": "no", **fields}
    reply = door.post("/api/fleet/deploy", json=body)
    assert reply.status_code == 200, reply.text


@pytest.fixture
async def stub(fleet: FleetProcess) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{fleet.grpc_port}") as channel:
        yield fleet_pb2_grpc.FleetStub(channel)


def test_the_last_lines_and_the_exit(door: httpx.Client) -> None:
    deploy(door, "sh -c 'for i in 1 2 3; do echo line $i; done; echo bad >&2; exit 3'")
    with door.stream("GET", f"{PATH}/stream") as stream:
        entries = [json.loads(line) for line in stream.iter_lines()]
    assert entries[-1] == {"exit": {"exit_code": 3, "signal": None, "oom_killed": False}}
    lines = [(entry["line"]["stream"], entry["line"]["text"]) for entry in entries[:-1]]
    assert sorted(lines) == [("stderr", "bad"), ("stdout", "line 1"), ("stdout", "line 2"), ("stdout", "line 3")]

    reply = door.get(f"{PATH}?tail=100").json()
    assert (reply["node_id"], reply["container_name"], reply["exit"]["exit_code"]) == (NODE, "writer", 3)
    assert [line["text"] for line in reply["lines"] if line["stream"] == "stdout"] == ["line 1", "line 2", "line 3"]
    assert len(door.get(f"{PATH}?tail=2").json()["lines"]) == 2
    assert door.get(f"{PATH}?tail=0").json()["lines"] == []
    second = next(line for line in reply["lines"] if line["text"] == "line 2")["time"]
    since = door.get(PATH, params={"since": second}).json()["lines"]
    assert "line 1" not in [line["text"] for line in since]
    until = door.get(PATH, params={"until": second}).json()["lines"]
    assert "line 3" not in [line["text"] for line in until]
    for bad in ("tail=-1", "tail=10001", "since=yesterday"):
        assert door.get(f"{PATH}?{bad}").status_code == 400
    missing = door.get(f"/api/fleet/logs/{NODE}/nosuch")
    assert (missing.status_code, missing.json()["reason"]) == (404, "CONTAINER_NOT_FOUND")
    missing = door.get(f"/api/fleet/logs/{NODE}/nosuch/stream")
    assert (missing.status_code, missing.json()["reason"]) == (404, "CONTAINER_NOT_FOUND")


async def test_follow_waits_for_the_start_and_goes_over_restarts(
    door: httpx.Client, dockerd: docker.DockerClient, stub: Any
) -> None:
    made = dockerd.containers.create(
        IMAGE,
        ["sh", "-c", "echo run; exit 5"],
        name="writer",
        restart_policy={"Name": "on-failure", "MaximumRetryCount": 2},
    )
    call = stub.StreamLogs(fleet_pb2.StreamLogsRequest(node_id=NODE, container_name="writer"))
    following = asyncio.create_task(_texts(call))
    await asyncio.to_thread(door.get, PATH)
    assert not following.done()
    await asyncio.to_thread(made.start)
    texts, exit_code = await following
    assert (texts, exit_code) == (["run"] * 3, 5)


async def _texts(call: Any) -> tuple[list[str], int]:
    texts, exit_code = [], -1
    async for entry in call:
        if entry.HasField("line"):
            texts.append(entry.line.text)
        else:
            exit_code = entry.exit.exit_code
    return texts, exit_code


class HastyEngine(DockerEngine):
    """Whose replies that follow end ahead of the last lines, as those of Docker 20.10 do now and then."""

    @asynccontextmanager
    async def stream(
        self, path: str, params: Mapping[str, Any], *, silence_seconds: float | None = None
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        async with super().stream(path, params, silence_seconds=silence_seconds) as chunks:
            yield _cut(chunks, 700) if params["follow"] == "1" else chunks


async def _cut(chunks: AsyncIterator[bytes], length: int) -> AsyncIterator[bytes]:
    async for chunk in chunks:
        yield chunk[:length]
        length = max(0, length - len(chunk))


@pytest.fixture
async def logs(engine: DockerDaemon, roots: Path) -> AsyncIterator[ContainerLogs]:
    hasty = HastyEngine(engine.url)
    yield ContainerLogs(hasty, Containers(NODE, hasty, MountPolicy((roots,))))
    await hasty.close()


async def test_lines_that_the_engine_left_out_as_the_container_ended_come_all_the_same(
    dockerd: docker.DockerClient, logs: ContainerLogs
) -> None:
    command = ["sh", "-c", "i=0; while [ $i -lt 50 ]; do echo $i; i=$((i+1)); done; echo bad >&2; exit 7"]
    await asyncio.to_thread(dockerd.containers.run, IMAGE, command, name="writer", detach=True)
    request = fleet_pb2.StreamLogsRequest(node_id=NODE, container_name="writer", follow=True)
    entries: list[Any] = [entry async for entry in logs.entries(request)]
    *lines, exit_ = entries
    assert [line.text for line in lines if line.stream == "stdout"] == [str(number) for number in range(50)]
    assert [line.text for line in lines if line.stream == "stderr"] == ["bad"]
    assert exit_.exit_code == 7


async def test_the_end_of_a_container_that_is_removed_at_once_is_told(
    dockerd: docker.DockerClient, logs: ContainerLogs, monkeypatch: pytest.MonkeyPatch
) -> None:
    await asyncio.to_thread(dockerd.containers.run, IMAGE, ["sh", "-c", "echo one; exit 7"], name="writer", detach=True)
    inspect = logs._inspect

    async def removed_after(name: str) -> dict[str, Any]:
        attrs = await inspect(name)
        if attrs["State"]["Status"] == "exited":
            await asyncio.to_thread(dockerd.containers.get(name).remove)
        return attrs

    await wait_until(lambda: dockerd.containers.get("writer").status == "exited")
    request = fleet_pb2.StreamLogsRequest(node_id=NODE, container_name="writer", follow=True)
    entries: AsyncIterator[Any] = logs.entries(request)
    first = await anext(entries)
    monkeypatch.setattr(logs, "_inspect", removed_after)
    (exit_,) = [entry async for entry in entries]
    assert (first.text, exit_.exit_code) == ("one", 7)


async def test_many_follow_and_those_who_do_not_read_hurt_nobody(door: httpx.Client, stub: Any) -> None:
    """The others get every line, and who reads late gets all as well."""
    lines, followers, stalled = 3_000, 12, 4
    wide = "x" * 1_000
    waits = "while [ ! -f /tmp/go ]; do sleep 0.05; done"
    writes = f"i=0; while [ $i -lt {lines} ]; do echo $i {wide}; i=$((i+1)); done"
    deploy(door, f"sh -c '{waits}; {writes}; exit 7'")
    request = fleet_pb2.StreamLogsRequest(node_id=NODE, container_name="writer", tail=0)
    slow = [stub.StreamLogs(request) for _ in range(stalled)]
    calls = [stub.StreamLogs(request) for _ in range(followers)]
    await asyncio.gather(*(call.initial_metadata() for call in (*slow, *calls)))
    quick = [asyncio.create_task(_texts(call)) for call in calls]
    begin = {"command": "sh -c 'echo > /tmp/go'", "container_name": "writer"}
    begun = await asyncio.to_thread(door.post, f"/api/fleet/exec/{NODE}", json=begin)
    assert begun.json()["exit_code"] == 0, begun.text
    expected = [f"{number} {wide}" for number in range(lines)]
    for texts, exit_code in await asyncio.gather(*quick):
        assert texts == expected
        assert exit_code == 7
    for texts, exit_code in await asyncio.gather(*(_texts(call) for call in slow)):
        assert texts == expected
        assert exit_code == 7
