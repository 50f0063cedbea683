"""Deploys while the agent is killed again and again: each runs once, or its caller hears that nobody knows."""

from __future__ import annotations

import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import docker
import httpx
import pytest

from tests.containers.conftest import NODE, fleet_on
from tests.docker_daemon import IMAGE, DockerDaemon
from tests.waiting import wait_until_now

DEPLOYS, KILLS = 5, 2


@pytest.mark.usefixtures("clean")
def test_five_deploys_among_kills(engine: DockerDaemon, place: Path, roots: Path, dockerd: docker.DockerClient) -> None:
    chance = random.Random(5)
    with (
        fleet_on(engine, place / "killed", roots) as fleet,
        httpx.Client(base_url=fleet.url, timeout=50) as door,
        ThreadPoolExecutor(DEPLOYS) as callers,
    ):
        wait_until_now(lambda: _online(door))
        ended = [callers.submit(_deployed, fleet.url, number) for number in range(DEPLOYS)]
        for _ in range(KILLS):
            wait_until_now(lambda: _online(door))
            time.sleep(chance.uniform(0.1, 0.7))
            for pid in fleet.pids("fleet_agent"):
                os.kill(pid, signal.SIGKILL)
        ends = [one.result() for one in ended]
        wait_until_now(lambda: _online(door))
        # Whatever came of it, the same call again changes nothing.
        made = sorted((one.name or "", one.id) for one in dockerd.containers.list(all=True))
        assert [_post(door, number) for number in range(DEPLOYS)] == ends
        assert sorted((one.name or "", one.id) for one in dockerd.containers.list(all=True)) == made
    assert set(ends) <= {(200, ""), (500, "OUTCOME_UNKNOWN")}
    states = {one.name: one.status for one in dockerd.containers.list(all=True)}
    # Nothing is left half-made: it runs, or it is not there.
    assert set(states.values()) <= {"running"}
    assert all(states.get(f"app-{number}") for number, end in enumerate(ends) if end == (200, ""))


def _deployed(url: str, number: int) -> tuple[int, str]:
    """Deploys once, again where the node was away before it began."""
    with httpx.Client(base_url=url, timeout=50) as door:
        while (end := _post(door, number))[1] == "NODE_OFFLINE":
            wait_until_now(lambda: _online(door))
        return end


def _post(door: httpx.Client, number: int) -> tuple[int, str]:
    body = {"node_id": NODE, "image": IMAGE, "name": f"app-{number}", "request_id": f"deploy-{number}"}
    reply = door.post("/api/fleet/deploy", json=body)
    return reply.status_code, reply.json().get("reason", "")


def _online(door: httpx.Client) -> bool:
    node = door.get(f"/api/nodes/{NODE}").json()
    return bool(node.get("status") == "online" and node["docker_version"])
