"""A Docker engine in namespaces of its own, and a fleet whose one node runs containers on it."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import docker
import httpx
import pytest

from tests.docker_daemon import DockerDaemon, docker_daemon
from tests.e2e.fleet_process import FleetProcess
from tests.waiting import wait_until_now

NODE = "agx0"


def fleet_on(daemon: DockerDaemon, folder: Path, roots: Path, **environment: str) -> FleetProcess:
    """A fleet whose node has this engine, and lets containers see what is below `roots`."""
    return FleetProcess(
        folder,
        environment={
            "FLEET_AGENT_DOCKER_HOST": daemon.url,
            "FLEET_AGENT_DOCKER_SECONDS": "0.3",
            "FLEET_AGENT_MOUNT_ROOTS": str(roots),
            "FLEET_AGENT_NODE_ID": NODE,
            **environment,
        },
    )


@pytest.fixture(scope="package")
def place() -> Iterator[Path]:
    """A folder with a short path: sockets lie in it."""
    folder = Path(tempfile.mkdtemp(prefix="fleet-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="package")
def roots(place: Path) -> Path:
    """The node's one mount root."""
    (place / "models").mkdir()
    (place / "models" / "hello.txt").write_text("from the node\n")
    return place / "models"


@pytest.fixture(scope="package")
def engine(place: Path) -> Iterator[DockerDaemon]:
    with docker_daemon(place / "engine") as daemon:
        yield daemon


@pytest.fixture(scope="package")
def dockerd(engine: DockerDaemon) -> Iterator[docker.DockerClient]:
    """The engine itself, to look at what was really done."""
    client = engine.client()
    yield client
    client.close()


@pytest.fixture(scope="package")
def fleet(engine: DockerDaemon, place: Path, roots: Path) -> Iterator[FleetProcess]:
    with fleet_on(engine, place / "data", roots) as process:
        yield process


@pytest.fixture(scope="package")
def door(fleet: FleetProcess) -> Iterator[httpx.Client]:
    """The fleet's REST door, its node known with its engine."""
    with httpx.Client(base_url=fleet.url, timeout=60) as session:

        def there() -> bool:
            node = session.get(f"/api/nodes/{NODE}").json()
            return bool(node.get("status") == "online" and node["docker_version"])

        wait_until_now(there)
        yield session


@pytest.fixture
def clean(dockerd: docker.DockerClient) -> Iterator[None]:
    """The test's containers are removed; one that somebody else is removing just now goes too."""
    yield

    def empty() -> bool:
        left = dockerd.containers.list(all=True, ignore_removed=True)
        for container in left:
            with contextlib.suppress(docker.errors.APIError):
                container.remove(force=True, v=True)
        return not left

    wait_until_now(empty)


def names(dockerd: docker.DockerClient) -> list[str | None]:
    """Containers that are there; one that goes meanwhile is none."""
    return [one.name for one in dockerd.containers.list(all=True, ignore_removed=True)]
