"""Containers on a real Docker engine, through the documented calls."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import docker
import httpx
import pytest

from tests import documented
from tests.containers.conftest import NODE, names
from tests.docker_daemon import IMAGE, DockerDaemon
from tests.e2e.fleet_process import FleetProcess
from tests.waiting import wait_until_now

pytestmark = pytest.mark.usefixtures("clean")


def deployed(door: httpx.Client, name: str = "myapp", **fields: Any) -> dict[str, Any]:
    reply = door.post("/api/fleet/deploy", json={"node_id": NODE, "image": IMAGE, "name": name, **fields})
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def refused(door: httpx.Client, status: int, reason: str, name: str = "myapp", **fields: Any) -> str:
    body = {"node_id": NODE, "image": IMAGE, "name": name, **fields}
    reply = door.post("/api/fleet/deploy", json=body)
    said = reply.json()
    assert (reply.status_code, said["reason"]) == (status, reason), reply.text
    return str(said["detail"])


def test_the_documented_deploy_runs_is_shown_and_removed(
    door: httpx.Client, engine: DockerDaemon, dockerd: docker.DockerClient, roots: Path
) -> None:
    """As documented but for the GPUs, which this engine has not."""
    container = deployed(
        door,
        port=8080,
        host_port=18080,
        mounts=[f"{roots}:/models:ro"],
        command="httpd -f -p 8080 -h /models",
        env={"HF_HOME": "/models", "SECRET": "s3cret"},
        labels={"team": "vision"},
        cpus=0.5,
        memory_bytes=64 << 20,
    )
    assert container["status"] == "running"
    assert container["managed"] is True
    assert (container["port"], container["host_port"]) == (8080, 18080)
    assert container["mounts"] == [f"{roots}:/models:ro"]
    assert container["env_names"] == ["HF_HOME", "SECRET"]
    assert container["labels"] == {"team": "vision"}
    assert container["image"] == IMAGE
    assert container["image_digest"].startswith("sha256:")
    assert container["restart_policy"] == "unless_stopped"
    assert "s3cret" not in json.dumps(container)

    served = wait_until_now(lambda: _get(engine, "http://127.0.0.1:18080/hello.txt"))
    assert served == b"from the node\n"

    real = dockerd.containers.get("myapp").attrs
    assert real["HostConfig"]["SecurityOpt"] == ["no-new-privileges:true"]
    assert real["HostConfig"]["PidsLimit"] == 4096
    assert not real["HostConfig"]["Privileged"]
    assert (real["HostConfig"]["NanoCpus"], real["HostConfig"]["Memory"]) == (500_000_000, 64 << 20)
    assert "s3cret" not in json.dumps(real["Config"]["Labels"])

    one = door.get(f"/api/fleet/deploy/{NODE}/myapp").json()
    assert one["stats"]["memory_used_bytes"] > 0
    assert one["stats"]["memory_limit_bytes"] == 64 << 20
    listed = door.get("/api/fleet/deploy").json()
    assert [entry["name"] for entry in listed["containers"]] == ["myapp"]
    assert listed["unreachable_node_ids"] == []
    assert door.get(f"/api/nodes/{NODE}").json()["docker_version"]

    removed = door.delete(f"/api/fleet/deploy/{NODE}/myapp", params={"stop_grace_seconds": 0})
    assert removed.status_code == 200
    assert removed.json()["status"] == "removed"
    assert names(dockerd) == []
    again = door.delete(f"/api/fleet/deploy/{NODE}/myapp")
    assert (again.status_code, again.json()["reason"]) == (404, "CONTAINER_NOT_FOUND")


def _get(engine: DockerDaemon, url: str) -> bytes | None:
    done = engine.inside("curl", "-s", "--noproxy", "*", url, check=False)
    return done.stdout or None


def test_a_failed_start_leaves_no_container_and_says_why(door: httpx.Client, dockerd: docker.DockerClient) -> None:
    deployed(door, "first", port=8080, host_port=18081)
    assert "18081" in refused(door, 409, "PORT_IN_USE", port=8080, host_port=18081)
    assert "first" in refused(door, 409, "NAME_IN_USE", "first")
    assert refused(door, 503, "GPU_UNAVAILABLE", gpus=True).startswith("gpus: could not select device driver")
    assert "nosuch" in refused(door, 400, "INVALID_FIELD", command="nosuch --flag")
    assert "fleet-test:none" in refused(door, 404, "IMAGE_NOT_FOUND", image="fleet-test:none", pull="never")
    assert refused(door, 503, "REGISTRY_UNAVAILABLE", image="127.0.0.1:1/app:1")
    assert refused(door, 400, "INVALID_FIELD", image="Not An Image").startswith("image")
    assert refused(door, 400, "INVALID_FIELD", command="'unbalanced").startswith("command")
    assert refused(door, 400, "INVALID_FIELD", labels={"fleet.node_id": "x"}).startswith("labels.fleet.node_id")
    assert refused(door, 400, "INVALID_FIELD", host_port=80).startswith("host_port")
    assert refused(door, 404, "NODE_NOT_FOUND", node_id="nowhere")
    assert names(dockerd) == ["first"]


def test_what_the_fleet_did_not_start_is_left_alone(door: httpx.Client, dockerd: docker.DockerClient) -> None:
    dockerd.containers.run(IMAGE, name="theirs", detach=True)
    listed = door.get("/api/fleet/deploy").json()["containers"]
    assert [(one["name"], one["managed"]) for one in listed] == [("theirs", False)]
    reply = door.delete(f"/api/fleet/deploy/{NODE}/theirs")
    assert (reply.status_code, reply.json()["reason"]) == (403, "PRIVILEGE_FORBIDDEN")
    assert dockerd.containers.get("theirs").status == "running"


def test_the_same_key_deploys_once(door: httpx.Client, dockerd: docker.DockerClient) -> None:
    body = {"node_id": NODE, "image": IMAGE, "name": "once"}
    replies = [door.post("/api/fleet/deploy", json=body, headers={"Idempotency-Key": "deploy-1"}) for _ in range(2)]
    assert [reply.status_code for reply in replies] == [200, 200]
    assert replies[0].json() == replies[1].json()
    other = door.post("/api/fleet/deploy", json={**body, "name": "two"}, headers={"Idempotency-Key": "deploy-1"})
    assert (other.status_code, other.json()["reason"]) == (409, "IDEMPOTENCY_KEY_REUSED")
    assert names(dockerd) == ["once"]


def test_changes_of_containers_are_events(door: httpx.Client, dockerd: docker.DockerClient) -> None:
    deployed(door, "told", command="sleep 1000")
    wanted = {"type": "container_update", "node_id": NODE, "since": "0"}
    found: list[tuple[str, int | None]] = []
    with door.stream("GET", "/api/events", params=wanted) as events:
        for line in events.iter_lines():
            event = json.loads(line)
            if event["type"] != "container_update" or event["data"]["name"] != "told":
                continue
            told = event["data"]
            found.append((told["status"], told["exit"] and told["exit"]["exit_code"]))
            # Each change has been told before the next is made: what comes close together is told as one.
            if told["status"] == "running":
                dockerd.containers.get("told").stop(timeout=0)
            if told["status"] == "exited":
                door.delete(f"/api/fleet/deploy/{NODE}/told")
            if told["status"] == "removed":
                break
    assert found == [("running", None), ("exited", 137), ("removed", 137)]


def test_a_drain_waits_for_containers_and_removes_them_at_its_deadline(
    door: httpx.Client, engine: DockerDaemon, dockerd: docker.DockerClient
) -> None:
    path, ends = f"/api/nodes/{NODE}", "sh -c 'trap exit TERM; while :; do sleep 0.1; done'"

    def drain(seconds: int | None = None) -> dict[str, Any]:
        asked = {"deadline_seconds": seconds}
        reply = door.get(path) if seconds is None else door.post(f"{path}/drain", json=asked)
        found: dict[str, Any] = reply.json()["drain"]
        return found

    for name in ("first", "second"):
        deployed(door, name, command=ends)
    dockerd.containers.run(IMAGE, name="theirs", detach=True)
    with ThreadPoolExecutor(1) as callers, silent_registry(engine) as (image, asked):
        pulls = callers.submit(door.post, "/api/fleet/deploy", json={"node_id": NODE, "image": image, "name": "third"})
        assert asked() == b"asked\n"
        drain(3600)
        # The one that is still being pulled counts too.
        wait_until_now(lambda: drain()["remaining_containers"] == 3)
        assert refused(door, 503, "NO_NODE", "late").startswith("node_id")
        assert door.delete(f"/api/fleet/deploy/{NODE}/first").status_code == 200
        wait_until_now(lambda: drain()["remaining_containers"] == 2)
        # The deadline is now: what runs is removed, what is not there yet is waited for.
        drain(0)
        wait_until_now(lambda: names(dockerd) == ["theirs"])
        wait_until_now(lambda: drain()["remaining_containers"] == 1)
        assert not drain()["done"]
    assert pulls.result().json()["reason"] == "REGISTRY_UNAVAILABLE"
    wait_until_now(lambda: drain()["done"])
    assert dockerd.containers.get("theirs").status == "running"
    assert door.post(f"{path}/uncordon").json()["drain"] is None
    deployed(door, "after")


@contextlib.contextmanager
def silent_registry(engine: DockerDaemon) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """The name of an image whose registry takes connections and says nothing until the block ends, and what waits until
    it is asked."""
    listens = [
        "import socket, time",
        "door = socket.create_server(('127.0.0.1', 5077))",
        "print('listens', flush=True)",
        "called = door.accept()",
        "print('asked', flush=True)",
        "time.sleep(1000)",
    ]
    command = engine.entering(sys.executable, "-c", "\n".join(listens))
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"listens\n"
            yield "127.0.0.1:5077/app:1", process.stdout.readline
        finally:
            process.kill()


def test_the_documented_lines_where_the_engine_has_gpus(
    tmp_path: Path, engine: DockerDaemon, roots: Path, fleet: FleetProcess, door: httpx.Client
) -> None:
    """A stub of the vendor's hook stands for the driver: the container starts, and is told of its devices.

    The engine looks for the hook when it starts, so it is started again.
    """
    hook = tmp_path / "nvidia-container-runtime-hook"
    hook.write_text("#!/bin/sh\nexit 0\n")
    hook.chmod(0o755)
    engine.kill()
    engine.start(environment={"PATH": os.pathsep.join([str(tmp_path), os.environ["PATH"], "/usr/sbin", "/sbin"])})
    try:
        with contextlib.closing(engine.client()) as docker_engine:
            # It is on the node already, so the registry that the name tells of is not asked.
            docker_engine.images.get(IMAGE).tag("192.168.1.214:5000/myapp", "latest")
        wait_until_now(lambda: _reached(door))
        mount = {"/mnt/s3-models": str(roots)}
        container = documented.reply(documented.DEPLOY, fleet.url, tmp_path, mount)
        assert (container["name"], container["status"], container["gpus"]) == ("myapp", "running", True)
        assert (container["port"], container["host_port"], container["mounts"]) == (8080, 8080, [f"{roots}:/models"])

        inside = {"container_name": "myapp", "command": "cat /proc/1/environ"}
        told = door.post(f"/api/fleet/exec/{NODE}", json=inside).json()
        assert "NVIDIA_VISIBLE_DEVICES=all" in told["stdout"].split("\0")
        # It runs as soon as its process is there, which says its word in its own time.
        with contextlib.closing(engine.client()) as docker_engine:
            wait_until_now(lambda: docker_engine.containers.get("myapp").logs())
        logs = documented.reply(documented.LOGS, fleet.url, tmp_path, node_id=NODE, container_name="myapp")
        assert [line["text"] for line in logs["lines"]] == ["hello"]
        done = documented.reply(documented.EXEC, fleet.url, tmp_path, node_id=NODE)
        if shutil.which("nvidia-smi") is None:
            assert (done["exit_code"], done["stderr"]) == (127, "nvidia-smi: No such file or directory")
        else:
            assert "NVIDIA" in done["stdout"] + done["stderr"]
        removed = documented.reply(documented.REMOVE, fleet.url, tmp_path, node_id=NODE, container_name="myapp")
        assert removed["status"] == "removed"
    finally:
        engine.kill()
        engine.start()
        wait_until_now(lambda: _reached(door))


def _reached(door: httpx.Client) -> bool:
    """Whether the node's agent reaches its engine."""
    reply = door.get("/api/fleet/deploy")
    return reply.status_code == 200 and not reply.json()["unreachable_node_ids"]


def test_restarts_of_server_and_agent_leave_containers_running_and_known(
    fleet: FleetProcess, door: httpx.Client, dockerd: docker.DockerClient
) -> None:
    def there() -> list[tuple[str, str]]:
        reply = door.get("/api/fleet/deploy").json()
        return [(one["name"], one["status"]) for one in reply.get("containers", ())]

    def online() -> bool:
        node = door.get(f"/api/nodes/{NODE}").json()
        return node.get("status") == "online" and bool(node.get("docker_version"))

    wait_until_now(online)
    deployed(door, "stays")
    begun = dockerd.containers.get("stays").attrs["State"]["StartedAt"]
    killed = fleet.pids("fleet_agent")
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    wait_until_now(lambda: set(fleet.pids("fleet_agent")) - set(killed))
    # The node may be taken for online until the server has heard of its end, and then cannot be asked.
    wait_until_now(lambda: online() and there() == [("stays", "running")])
    fleet.kill()
    fleet.start()
    door.base_url = fleet.url
    wait_until_now(lambda: online() and there() == [("stays", "running")])
    assert dockerd.containers.get("stays").attrs["State"]["StartedAt"] == begun
