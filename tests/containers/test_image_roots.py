"""Which images containers may be made of: each way around the list is refused, and its honest twin allowed."""

from __future__ import annotations

import docker
import pytest
from fleet.v1 import fleet_pb2, types_pb2

from fleet_agent.commands import CommandFault
from fleet_agent.containers.containers import ContainerLimits, Containers
from fleet_agent.containers.image_roots import ImagePolicy
from fleet_agent.containers.mounts import MountPolicy
from fleet_agent.docker_engine import DockerEngine
from fleet_agent.settings import AgentSettings
from fleet_agent.swarm.manager import SwarmManager
from tests.containers.conftest import NODE, names
from tests.docker_daemon import IMAGE, DockerDaemon

LIST = ("192.168.1.214:5000/team", "ghcr.io", "python", "docker.io/bitnami/", "localhost")


@pytest.mark.parametrize(
    "image",
    [
        *("192.168.1.214:5000/team/train:3", "192.168.1.214:5000/team/a/b@sha256:" + "a" * 64),
        *("192.168.1.214:5000/team", "ghcr.io/anything:1", "localhost/mine:1"),
        *("python", "python:3.13", "library/python", "docker.io/python", "index.docker.io/library/python:3"),
        *("bitnami/redis", "docker.io/bitnami/redis:7"),
    ],
)
def test_what_lies_below_a_root_is_allowed(image: str) -> None:
    ImagePolicy(LIST).judge(image)
    ImagePolicy().judge(image)


@pytest.mark.parametrize(
    "image",
    [
        *("192.168.1.214:5000/teams/train:3", "192.168.1.214:5000/other:1", "192.168.1.214/team/x", "team/x"),
        *("evil.example/192.168.1.214:5000/team/x", "evil.example/ghcr.io/x", "ghcr.io.evil.example/x"),
        *(
            "ghcr.io:444/x",
            "python/evil",
            "bitnami",
            "nginx",
            "docker.io/nginx",
            "evil/python",
            "evil.example/python",
            "evil.example/bitnami/redis",
            "python3",
        ),
        # The engine takes a first part with a capital for a registry; and an id for any image of the node.
        *("Evil/python", "a1b2c3d4e5f6", "sha256:" + "a" * 64, "a" * 64, ""),
    ],
)
def test_every_other_is_refused(image: str) -> None:
    words = r"image roots \(192.168.1.214:5000/team, ghcr.io.*FLEET_AGENT_IMAGE_ROOTS"
    with pytest.raises(CommandFault, match=words) as told:
        ImagePolicy(LIST).judge(image)
    assert told.value.reason == "PRIVILEGE_FORBIDDEN"
    ImagePolicy().judge(image)


def test_all_of_the_hub() -> None:
    for name in ("docker.io", "index.docker.io/"):
        ImagePolicy([name]).judge("nginx")
        ImagePolicy([name]).judge("bitnami/redis")
        with pytest.raises(CommandFault):
            ImagePolicy([name]).judge("ghcr.io/nginx")


def test_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    assert AgentSettings().image_roots == ()
    assert "image_roots" not in AgentSettings().engine_options()
    monkeypatch.setenv("FLEET_AGENT_IMAGE_ROOTS", "ghcr.io, python")
    assert AgentSettings().image_roots == ("ghcr.io", "python")
    assert AgentSettings().engine_options()["image_roots"] == "ghcr.io,python"


@pytest.mark.usefixtures("clean")
async def test_deploys_and_updates_obey_it(engine: DockerDaemon, dockerd: docker.DockerClient) -> None:
    """The same image is refused where it is not listed, before anything is looked for, and started where it is."""
    room = DockerEngine(engine.url)
    request = fleet_pb2.DeployContainerRequest(image=IMAGE, name="judged", pull=types_pb2.PULL_POLICY_NEVER)
    request.restart_policy = types_pb2.RESTART_POLICY_NO

    async def tell(*_: object) -> None:
        """Nothing is pulled."""

    def containers(root: str) -> Containers:
        return Containers(NODE, room, MountPolicy([]), ContainerLimits(images=ImagePolicy([root])))

    try:
        for image in (IMAGE, dockerd.images.get(IMAGE).id or ""):
            request.image = image
            with pytest.raises(CommandFault) as told:
                await containers("ghcr.io").deploy(request, "c1", tell)
            assert told.value.reason == "PRIVILEGE_FORBIDDEN"
        assert names(dockerd) == []
        request.image = IMAGE
        made = await containers(IMAGE.partition(":")[0]).deploy(request, "c1", tell)
        assert made.status == types_pb2.CONTAINER_STATUS_RUNNING
        with pytest.raises(CommandFault, match="image roots"):
            await SwarmManager(room, ImagePolicy(["ghcr.io"])).update("app", IMAGE)
        with pytest.raises(CommandFault) as told:
            await SwarmManager(room, ImagePolicy([IMAGE.partition(":")[0]])).update("app", IMAGE)
        assert told.value.reason == "NOT_SWARM_MANAGER", "the list lets it through"
    finally:
        await room.close()
