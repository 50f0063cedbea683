"""Which folders of a node containers may see: each way around the list is refused, and its honest twin allowed."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path

import docker
import httpx
import pytest
from fleet.v1 import fleet_pb2, types_pb2
from pydantic import ValidationError

from fleet_agent.commands import CommandFault
from fleet_agent.containers.containers import Containers
from fleet_agent.containers.mounts import BindMount, MountPolicy
from fleet_agent.docker_engine import DockerEngine
from fleet_agent.settings import AgentSettings
from tests.containers.conftest import NODE, names
from tests.docker_daemon import IMAGE, DockerDaemon


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root" / "inner").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    return tmp_path / "root"


def reason(policy: MountPolicy, *mounts: str) -> str:
    with pytest.raises(CommandFault) as caught:
        policy.judge(mounts)
    return caught.value.reason


def test_what_lies_below_a_root_is_allowed(root: Path) -> None:
    policy = MountPolicy([root])
    (root / "file").write_text("x")
    (root / "link").symlink_to(root / "inner")
    assert policy.judge([f"{root}:/a", f"{root}/inner:/b:ro", f"{root}/file:/c"]) == [
        BindMount(str(root), "/a", False),
        BindMount(str(root / "inner"), "/b", True),
        BindMount(str(root / "file"), "/c", False),
    ]
    # A link that stays below is what it stands for.
    assert policy.judge([f"{root}/link:/d"])[0].source == str(root / "inner")
    assert policy.judge([f"{root}/inner/../inner:/e"])[0].source == str(root / "inner")


def test_a_root_may_itself_be_a_link(root: Path, tmp_path: Path) -> None:
    (tmp_path / "named").symlink_to(root)
    assert MountPolicy([tmp_path / "named"]).judge([f"{tmp_path}/named/inner:/a"])[0].source == str(root / "inner")


def test_every_way_out_is_refused(root: Path, tmp_path: Path) -> None:
    policy = MountPolicy([root])
    (root / "up").symlink_to("..")
    (root / "etc").symlink_to("/etc")
    (root / "all").symlink_to("/")
    (root / "loop").symlink_to(root / "loop")
    os.mkfifo(root / "pipe")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(root / "s"))
    for source in (
        *("/", "/etc", "/proc", "/sys", "/root", "/var/run/docker.sock", "/run", str(tmp_path), f"{tmp_path}/outside"),
        *(f"{root}/..", f"{root}/../outside", f"{root}x", f"{root}/up", f"{root}/up/outside"),
        *(f"{root}/etc", f"{root}/etc/shadow", f"{root}/all", f"{root}/all/etc", f"{root}/loop"),
        *(f"{root}/pipe", f"{root}/s"),
    ):
        assert reason(policy, f"{source}:/x") == "MOUNT_FORBIDDEN", source
    # Of what lies outside nobody learns whether it exists.
    assert reason(policy, "/etc/nosuch:/x") == reason(policy, "/etc/passwd:/x") == "MOUNT_FORBIDDEN"
    assert reason(policy, f"{root}/nosuch:/x") == "INVALID_FIELD"
    assert reason(MountPolicy([]), f"{root}:/x") == "MOUNT_FORBIDDEN"


def test_what_guards_the_node_is_forbidden_whatever_the_list_says(root: Path) -> None:
    policy = MountPolicy([root], forbidden=[root / "inner" / "keys"])
    (root / "inner" / "keys").mkdir()
    (root / "fine").mkdir()
    for source in (root, root / "inner", root / "inner" / "keys"):
        assert reason(policy, f"{source}:/x") == "MOUNT_FORBIDDEN"
    assert policy.judge([f"{root}/fine:/x"])
    assert reason(MountPolicy([Path("/")]), "/etc:/x") == "MOUNT_FORBIDDEN"
    assert reason(MountPolicy([Path("/")]), "/:/x") == "MOUNT_FORBIDDEN"


@pytest.mark.parametrize(
    "mount",
    [
        *("", "/a", "a:/b", "/a:b", "/a:/b:rw", "/a:/b:ro:z", "/a:/b:ro,exec", ":/b", "/a:"),
        *(
            "{root}:/",
            "{root}:/proc",
            "{root}:/proc/x",
            "{root}:/sys/y",
            "{root}:/dev",
            "{root}:/x/../..",
            "{root}:/\n",
        ),
    ],
)
def test_what_is_no_mount_is_said(root: Path, mount: str) -> None:
    assert reason(MountPolicy([root]), mount.format(root=root)) == "INVALID_FIELD"


def test_no_place_is_mounted_on_twice(root: Path) -> None:
    assert reason(MountPolicy([root]), f"{root}:/a", f"{root}/inner:/a/") == "INVALID_FIELD"


@pytest.mark.parametrize(
    "roots", ["/", "/etc", "/etc/x", "/var", "/var/lib/docker/volumes", "/proc", "relative", "/run"]
)
def test_an_unsafe_root_stops_the_agent(roots: str) -> None:
    with pytest.raises(ValidationError):
        AgentSettings(mount_roots=roots)  # type: ignore[arg-type]


def test_settings_of_roots(monkeypatch: pytest.MonkeyPatch) -> None:
    assert AgentSettings().mount_roots == (Path("/mnt/s3-models"), Path("/srv/fleet"))
    monkeypatch.setenv("FLEET_AGENT_MOUNT_ROOTS", "/srv/a:/srv/b")
    assert AgentSettings().mount_roots == (Path("/srv/a"), Path("/srv/b"))
    monkeypatch.setenv("FLEET_AGENT_MOUNT_ROOTS", "")
    assert AgentSettings().mount_roots == ()
    with pytest.raises(ValidationError):
        AgentSettings(docker_host="tcp://127.0.0.1:2375")


class Swapped(MountPolicy):
    """Somebody puts a link to the outside in a folder's place, just before the path is looked at for the nth time."""

    def __init__(self, root: Path, looks: int) -> None:
        super().__init__([root])
        self._root, self._looks = root, looks

    def check(self, mounts: Sequence[BindMount]) -> None:
        self._looks -= 1
        if not self._looks:
            (self._root / "inner").rename(self._root / "kept")
            (self._root / "inner").symlink_to(self._root.parent / "outside")
            # The way that was asked for is an honest one again.
            (self._root / "way").unlink()
            (self._root / "way").symlink_to(self._root / "kept")
        super().check(mounts)


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize("look", [1, 2, 3])
async def test_a_folder_that_is_swapped_after_it_was_judged(
    root: Path, engine: DockerDaemon, dockerd: docker.DockerClient, look: int
) -> None:
    """Before the start, and after it; the twin is one where it comes too late to matter."""
    name = f"swapped-{look}"
    (root / "way").symlink_to(root / "inner")
    room = DockerEngine(engine.url)
    containers = Containers(NODE, room, Swapped(root, look))
    request = fleet_pb2.DeployContainerRequest(image=IMAGE, name=name, mounts=[f"{root}/way:/x"])
    request.pull, request.restart_policy = types_pb2.PULL_POLICY_NEVER, types_pb2.RESTART_POLICY_NO

    async def tell(*_: object) -> None:
        """Nothing is pulled."""

    try:
        if look == 3:
            await containers.deploy(request, "c1", tell)
            (mount,) = dockerd.containers.get(name).attrs["Mounts"]
            assert mount["Source"] == f"{root}/inner"
            return
        with pytest.raises(CommandFault) as caught:
            await containers.deploy(request, "c1", tell)
        assert caught.value.reason == "MOUNT_FORBIDDEN"
        assert names(dockerd) == []
        which = {"container": name, "event": "start"}
        starts = dockerd.events(since=1, until=int(time.time()) + 1, filters=which, decode=True)
        assert len(list(starts)) == look - 1, "it is not started at all where that can be helped"
    finally:
        await room.close()


@pytest.mark.usefixtures("clean")
def test_attacks_through_the_api(door: httpx.Client, roots: Path) -> None:
    """A container with an honest mount plants a link, and a second deploy asks for what it points to."""

    def deploy(name: str, **fields: object) -> httpx.Response:
        return door.post("/api/fleet/deploy", json={"node_id": NODE, "image": IMAGE, "name": name, **fields})

    assert deploy("honest", mounts=[f"{roots}:/models"]).status_code == 200
    planted = {"command": "sh -c 'busybox ln -s / /models/way-out'", "container_name": "honest"}
    assert door.post(f"/api/fleet/exec/{NODE}", json=planted).json()["exit_code"] == 0
    for source in ("/", "/etc", "/var/run/docker.sock", f"{roots}/way-out", f"{roots}/way-out/etc", f"{roots}/../data"):
        reply = deploy("attack", mounts=[f"{source}:/host"])
        said = reply.json()
        assert (reply.status_code, said["reason"]) == (403, "MOUNT_FORBIDDEN"), (source, said)
        assert said["detail"].startswith("mounts[0]")
    for field in ("privileged", "network_mode", "pid", "cap_add", "devices", "runtime", "user"):
        assert deploy("attack", **{field: True}).json()["reason"] == "UNKNOWN_FIELD"
    listed = door.get("/api/fleet/deploy").json()["containers"]
    assert [one["name"] for one in listed] == ["honest"]
