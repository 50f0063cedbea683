"""Images come from a real registry: told while they come, with logins that nobody keeps, known by their digest."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import httpx
import pytest

from tests.containers.conftest import NODE, names
from tests.docker_daemon import DockerDaemon, add_image
from tests.e2e.fleet_process import FleetProcess
from tests.swarm.registry import PASSWORD, USERNAME, registry

pytestmark = pytest.mark.usefixtures("clean")
OPEN, CLOSED = "127.0.0.1:5055", "127.0.0.1:5056"
LOGIN = {"username": USERNAME, "password": PASSWORD}


@pytest.fixture(scope="module")
def images(engine: DockerDaemon, dockerd: docker.DockerClient, place: Path) -> Iterator[dict[str, str]]:
    """`app:1` in a registry, open at one port, behind a login at the other; its digest by its tag."""
    with (
        registry(place / "registry", OPEN, within=engine.entering()),
        registry(place / "registry", CLOSED, login=True, within=engine.entering()),
    ):
        yield {"1": pushed(dockerd, "1")}


def pushed(dockerd: docker.DockerClient, tag: str, command: str = "sleep 1000") -> str:
    """Makes an image, puts it into the registry and forgets it; its digest."""
    add_image(dockerd, f"{OPEN}/app:{tag}", command)
    dockerd.images.push(f"{OPEN}/app", tag=tag)
    digest: str = dockerd.images.get(f"{OPEN}/app:{tag}").attrs["RepoDigests"][0].partition("@")[2]
    dockerd.images.remove(f"{OPEN}/app:{tag}", force=True)
    return digest


def deploy(door: httpx.Client, image: str, name: str = "pulled", **fields: Any) -> httpx.Response:
    return door.post("/api/fleet/deploy", json={"node_id": NODE, "image": image, "name": name, **fields})


def test_a_pull_is_told_and_its_digest_kept(door: httpx.Client, images: dict[str, str]) -> None:
    told: list[dict[str, Any]] = []
    listening = threading.Event()

    def listen() -> None:
        with door.stream("GET", "/api/events", params={"type": "operation_progress", "node_id": NODE}) as events:
            listening.set()
            for line in events.iter_lines():
                told.append(json.loads(line)["data"])
                if told[-1]["progress"] == 100:
                    return

    listener = threading.Thread(target=listen)
    listener.start()
    assert listening.wait(100)
    reply = deploy(door, f"{OPEN}/app:1", request_id="pull-1")
    assert reply.status_code == 200, reply.text
    assert reply.json()["image"] == f"{OPEN}/app:1"
    assert reply.json()["image_digest"] == images["1"]
    listener.join(100)
    assert {(one["operation"], one["request_id"], one["name"]) for one in told} == {("deploy", "pull-1", "pulled")}
    assert told[-1]["progress"] == 100


def test_what_is_on_the_node_is_pulled_again_only_where_asked(
    door: httpx.Client, dockerd: docker.DockerClient, images: dict[str, str]
) -> None:
    old = pushed(dockerd, "moving")
    first = deploy(door, f"{OPEN}/app:moving", "first").json()
    new = pushed_aside(dockerd, "moving", first["image_digest"])
    assert deploy(door, f"{OPEN}/app:moving", "second").json()["image_digest"] == old
    assert deploy(door, f"{OPEN}/app:moving", "third", pull="always").json()["image_digest"] == new
    assert old != new


def pushed_aside(dockerd: docker.DockerClient, tag: str, known: str) -> str:
    """Gives the tag another image in the registry, while the engine keeps the one that it has."""
    kept = dockerd.images.get(f"{OPEN}/app@{known}")
    digest = pushed(dockerd, tag, "sleep 2000")
    kept.tag(f"{OPEN}/app", tag)
    return digest


def test_what_no_registry_has(door: httpx.Client, dockerd: docker.DockerClient, images: dict[str, str]) -> None:
    for image in (f"{OPEN}/app:none", f"{OPEN}/nosuch:1"):
        reply = deploy(door, image)
        assert (reply.status_code, reply.json()["reason"]) == (404, "IMAGE_NOT_FOUND"), reply.text
    assert names(dockerd) == []


def test_a_login_is_used_and_kept_nowhere(
    door: httpx.Client, fleet: FleetProcess, dockerd: docker.DockerClient, images: dict[str, str]
) -> None:
    private = f"{CLOSED}/app:1"
    refused = deploy(door, private)
    assert (refused.status_code, refused.json()["reason"]) == (400, "INVALID_FIELD")
    wrong = deploy(door, private, registry_auth={"username": USERNAME, "password": "wrong-one"})
    assert wrong.status_code == 400, wrong.text
    assert wrong.json()["detail"].startswith("registry_auth")
    assert "wrong-one" not in wrong.text
    right = deploy(door, private, registry_auth=LOGIN, request_id="login-1")
    assert right.status_code == 200, right.text
    assert right.json()["image_digest"] == images["1"]
    assert PASSWORD not in right.text
    assert PASSWORD not in json.dumps(dockerd.containers.get("pulled").attrs)
    # The same key with the same content, whatever the password: the first reply again.
    assert deploy(door, private, registry_auth=LOGIN, request_id="login-1").json() == right.json()
    assert "wrong-one" not in fleet.log.read_text(errors="replace")
    journals = [*fleet.folder.rglob("commands.db*")]
    assert journals
    assert not [path for path in journals if PASSWORD.encode() in path.read_bytes()]
    assert sqlite3.connect(journals[0]).execute("SELECT count(*) FROM commands").fetchone()[0] > 0
