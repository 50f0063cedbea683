"""Deploys while the agent is killed wherever it matters: each runs once, or its caller hears that nobody knows.

`make soak` deploys 50, five at once, with two kills at each point.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import docker
import httpx
import pytest

from tests.docker_daemon import IMAGE, DockerDaemon
from tests.e2e.fleet_process import FAST, FleetProcess, clean_environment
from tests.waiting import wait_until_now

DEPLOYS = int(os.environ.get("FLEET_DEPLOYS", "5"))
POINTS = {
    # What comes of a deploy whose agent is killed there, and whether its container runs.
    "begun": ((500, "OUTCOME_UNKNOWN"), False),
    "made": ((500, "OUTCOME_UNKNOWN"), False),
    "started": ((500, "OUTCOME_UNKNOWN"), True),
    "ended": ((200, ""), True),
    "": ((200, ""), True),
}
ROUNDS = list(POINTS) * max(1, DEPLOYS // 25)
AT_ONCE = DEPLOYS // len(ROUNDS)
SECONDS = 100.0
KILLED = "agx1"


class Agent:
    """A further node on the same engine, which is killed again and again."""

    def __init__(self, folder: Path, fleet: FleetProcess, engine: DockerDaemon) -> None:
        self.point = folder / "point"
        self._log = folder / "log"
        self._environment = {
            **FAST,
            "CRASH_POINT": str(self.point),
            "FLEET_AGENT_DATA_DIR": str(folder / "data"),
            "FLEET_AGENT_DOCKER_HOST": engine.url,
            "FLEET_AGENT_DOCKER_SECONDS": "0.3",
            "FLEET_AGENT_NODE_ID": KILLED,
            "FLEET_AGENT_SERVER": f"127.0.0.1:{fleet.grpc_port}",
        }
        self.process = self._started()

    def _started(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tests.containers.crashing"]
        with self._log.open("ab") as log:
            return subprocess.Popen(
                command, env=clean_environment(self._environment), stderr=log, cwd=Path(__file__).parents[2]
            )

    def born_again(self) -> None:
        """Waits until it has killed itself, and starts it anew."""
        assert self.process.wait(SECONDS) == -signal.SIGKILL, self._log.read_text()[-2000:]
        self.process = self._started()


@pytest.fixture
def agent(short_path: Path, fleet: FleetProcess, engine: DockerDaemon, door: httpx.Client) -> Iterator[Agent]:
    made = Agent(short_path, fleet, engine)
    yield made
    made.process.kill()
    made.process.wait()
    wait_until_now(lambda: door.delete(f"/api/nodes/{KILLED}").status_code != 409, seconds=SECONDS)


@pytest.mark.usefixtures("clean")
@pytest.mark.timeout(60 * len(ROUNDS))
def test_deploys_among_kills(door: httpx.Client, agent: Agent, dockerd: docker.DockerClient) -> None:
    ends: dict[str, tuple[int, str]] = {}
    with ThreadPoolExecutor(AT_ONCE) as callers:
        for number, point in enumerate(ROUNDS):
            wait_until_now(lambda: _online(door), seconds=SECONDS)
            names = [f"app-{number}-{one}" for one in range(AT_ONCE)]
            if point:
                agent.point.write_text(point)
            deploys = callers.map(lambda name: _deployed(door, name), names)
            if point:
                agent.born_again()
            ends.update(zip(names, deploys, strict=True))
            if AT_ONCE == 1:
                wait_until_now(lambda: _online(door), seconds=SECONDS)
                assert (ends[names[0]], names[0] in _states(dockerd)) == POINTS[point], point
    wait_until_now(lambda: _online(door), seconds=SECONDS)
    assert set(ends.values()) <= {(200, ""), (500, "OUTCOME_UNKNOWN")}
    # Whatever came of it, the same call again changes nothing.
    made = sorted((one.name or "", one.id) for one in dockerd.containers.list(all=True, ignore_removed=True))
    assert {name: _post(door, name) for name in ends} == ends
    assert sorted((one.name or "", one.id) for one in dockerd.containers.list(all=True, ignore_removed=True)) == made
    # Nothing is left half-made: it runs, or it is not there.
    states = _states(dockerd)
    assert set(states.values()) <= {"running"}
    assert {name for name, end in ends.items() if end == (200, "")} <= set(states)


def _states(dockerd: docker.DockerClient) -> dict[str, str]:
    return {one.name or "": one.status for one in dockerd.containers.list(all=True, ignore_removed=True)}


def _deployed(door: httpx.Client, name: str) -> tuple[int, str]:
    """Deploys once, again where the node was away before it began."""
    while (end := _post(door, name))[1] == "NODE_OFFLINE":
        wait_until_now(lambda: _online(door), seconds=SECONDS)
    return end


def _post(door: httpx.Client, name: str) -> tuple[int, str]:
    body = {"node_id": KILLED, "image": IMAGE, "name": name, "request_id": f"deploy-{name}"}
    reply = door.post("/api/fleet/deploy", json=body)
    return reply.status_code, reply.json().get("reason", "")


def _online(door: httpx.Client) -> bool:
    node = door.get(f"/api/nodes/{KILLED}").json()
    return bool(node.get("status") == "online" and node["docker_version"])
