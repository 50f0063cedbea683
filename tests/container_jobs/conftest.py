"""A Docker engine in namespaces of its own, shared by the tests of this folder."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest

from tests.docker_daemon import DockerDaemon, docker_daemon


def names_of(dockerd: docker.DockerClient, *, all_: bool = True) -> list[str]:
    """The containers that there are; not all: those that run. In one question: they may go between two."""
    return [one["Names"][0].lstrip("/") for one in dockerd.api.containers(all=all_)]


@pytest.fixture(scope="package")
def place() -> Iterator[Path]:
    """A folder with a short path: sockets lie in it."""
    folder = Path(tempfile.mkdtemp(prefix="fleet-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="package")
def daemon(place: Path) -> Iterator[DockerDaemon]:
    with docker_daemon(place / "engine") as daemon:
        yield daemon


@pytest.fixture(scope="package")
def dockerd(daemon: DockerDaemon) -> Iterator[docker.DockerClient]:
    """The engine itself, to look at what was really done."""
    client = daemon.client()
    yield client
    client.close()


@pytest.fixture
def no_container_is_left(dockerd: docker.DockerClient) -> Iterator[None]:
    """No job leaves its container behind."""
    yield
    left = names_of(dockerd)
    for name in left:
        dockerd.api.remove_container(name, force=True, v=True)
    assert not left
