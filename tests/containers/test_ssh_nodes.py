"""Nodes without an agent: added by address, reached over Debian's sshd, answering as an agent's would."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import docker
import grpc
import httpx
import pytest
from fleet.v1 import fleet_pb2, fleet_pb2_grpc

from tests.containers.conftest import names
from tests.containers.exec_stream import Frame, Typist, ended
from tests.docker_daemon import IMAGE, DockerDaemon
from tests.e2e.fleet_process import FleetProcess, clean_environment
from tests.nodes.sshd import SshHost, ssh_host
from tests.waiting import wait_until_now

SECONDS = 100.0
ENOUGH = 14
"""Programs at once: more than sshd lets in on one connection."""


@pytest.fixture(scope="module")
def host(engine: DockerDaemon) -> Iterator[SshHost]:
    with ssh_host(2) as opened:
        opened.docker.symlink_to(engine.socket)
        yield opened


@pytest.fixture
def caller(door: httpx.Client) -> httpx.Client:
    return door


@pytest.fixture
async def stub(fleet: FleetProcess) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{fleet.grpc_port}") as channel:
        yield fleet_pb2_grpc.FleetStub(channel)


def wish(host: SshHost, node_id: str, **changes: Any) -> dict[str, Any]:
    return {"node_id": node_id, "address": host.address, "user": "root", "host_key": host.host_key, **changes}


def status(caller: httpx.Client, node_id: str) -> str:
    word: str = caller.get(f"/api/nodes/{node_id}").json()["status"]
    return word


@pytest.fixture(scope="module")
def node(host: SshHost, door: httpx.Client) -> Iterator[str]:
    """The host as a node, online once it lets the server's key in."""
    made = door.post("/api/nodes", json=wish(host, "plain", labels={"zone": "b"}, clusters=["lab"])).json()
    assert (made["transport"], made["status"], made["address"]) == ("ssh", "down", host.address)
    assert (made["labels"], made["clusters"]) == ({"zone": "b"}, ["lab"])
    (warning,) = made["warnings"]
    host.let_in(warning.partition(": ")[2])

    def there() -> bool:
        node = door.get("/api/nodes/plain").json()
        return bool(node["status"] == "online" and node["docker_version"])

    wait_until_now(there, seconds=SECONDS)
    yield "plain"
    door.delete("/api/nodes/plain")


def deploy(caller: httpx.Client, name: str, **fields: Any) -> httpx.Response:
    body = {"node_id": "plain", "image": IMAGE, "name": name, **fields}
    return caller.post("/api/fleet/deploy", json=body)


def test_an_ssh_node_describes_itself_and_takes_no_jobs(node: str, caller: httpx.Client, host: SshHost) -> None:
    seen = caller.get(f"/api/nodes/{node}").json()
    assert (seen["transport"], seen["slots"], seen["os"], seen["address"]) == ("ssh", 0, "linux", host.address)
    assert seen["host"]["memory_total_bytes"] > 0
    assert seen["metrics_source"] == "none"
    assert any("nvidia-smi" in warning for warning in seen["warnings"]), "what is missing is said"


def test_exec_over_ssh_answers_as_through_an_agent(node: str, caller: httpx.Client, host: SshHost) -> None:
    def run(command: str, **more: Any) -> Any:
        return caller.post(f"/api/fleet/exec/{node}", json={"command": command, **more})

    done = run("sh -c 'ip -4 -o addr show eth0; echo to stderr >&2; exit 3'").json()
    assert (done["exit_code"], done["stderr"]) == (3, "to stderr\n")
    assert host.address in done["stdout"], "it ran there"
    missing = run("no-such-program --x").json()
    assert missing["exit_code"] == 127
    assert "no-such-program" in missing["stderr"]
    assert run("printenv GREETING", env={"GREETING": "it's $HOME"}).json()["stdout"] == "it's $HOME\n"
    assert run("echo $HOME; echo 'a b'", shell=True).json()["stdout"] == "/root\na b\n"
    assert run("echo $(id) ; rm").json()["stdout"] == "$(id) ; rm\n", "no shell looks at it"
    big = run("head -c 3000000 /dev/zero").json()
    assert (len(big["stdout"]), big["truncated"]) == (1 << 20, True)
    # A sleep that no other run of these tests has.
    nap = f"sleep {20_000_000 + os.getpid()}"
    slow = run(nap, timeout_seconds=1)
    assert (slow.status_code, slow.json()["reason"]) == (504, "TIMEOUT")
    # What ran too long is ended.
    wait_until_now(lambda: nap not in run("ps -eo args", shell=False).json()["stdout"])


def test_the_same_command_takes_effect_once(node: str, caller: httpx.Client, host: SshHost) -> None:
    file = host.folder / "lines"
    body = {"command": f"sh -c 'echo line >> {file}'", "request_id": "just-once"}
    first = caller.post(f"/api/fleet/exec/{node}", json=body).json()
    again = caller.post(f"/api/fleet/exec/{node}", json=body).json()
    assert first == again
    assert file.read_text() == "line\n"


@pytest.mark.usefixtures("clean")
def test_containers_over_ssh_are_deployed_listed_followed_and_removed(
    node: str, caller: httpx.Client, dockerd: docker.DockerClient, roots: Path, fleet: FleetProcess
) -> None:
    ready = "trap 'exit 3' TERM; cat /models/hello.txt; while :; do sleep 0.1; done"
    made = deploy(caller, "far-app", mounts=[f"{roots}:/models:ro"], command=f'sh -c "{ready}"', port=8080)
    assert made.status_code == 200, made.text
    assert (made.json()["node_id"], made.json()["status"], made.json()["managed"]) == (node, "running", True)
    assert dockerd.containers.get("far-app").attrs["HostConfig"]["SecurityOpt"] == ["no-new-privileges:true"]
    listed = caller.get("/api/fleet/deploy", params={"node_id": node}).json()
    assert [one["name"] for one in listed["containers"]] == ["far-app"]
    assert caller.get(f"/api/fleet/deploy/{node}/far-app").json()["stats"]["memory_used_bytes"] > 0
    assert deploy(caller, "far-app").json()["reason"] == "NAME_IN_USE"

    follow = [sys.executable, "-m", "fleet_client", "logs", "-f", node, "far-app"]
    environment = clean_environment({"FLEET_URL": fleet.url})
    with subprocess.Popen(follow, stdout=subprocess.PIPE, text=True, env=environment) as logs:
        assert logs.stdout is not None
        assert logs.stdout.readline() == "from the node\n"
        removed = caller.delete(f"/api/fleet/deploy/{node}/far-app").json()
        assert (removed["status"], removed["exit"]["exit_code"]) == ("removed", 3)
        assert (logs.wait(SECONDS), logs.stdout.read()) == (3, "")
    assert names(dockerd) == []


@pytest.mark.usefixtures("clean")
def test_mounts_of_an_ssh_node_are_judged_by_what_they_are_there(
    node: str, caller: httpx.Client, roots: Path, tmp_path: Path
) -> None:
    """Each attack, and its twin that is allowed."""
    (roots / "inner").mkdir(exist_ok=True)
    links = {"there": roots / "inner", "up": tmp_path, "etc": Path("/etc")}
    for name, target in links.items():
        (roots / name).symlink_to(target)
    try:
        for source in ("/etc", "/run/docker.sock", f"{roots}/up", f"{roots}/etc", f"{roots}/../data"):
            refused = deploy(caller, "attack", mounts=[f"{source}:/x"])
            assert (refused.status_code, refused.json()["reason"]) == (403, "MOUNT_FORBIDDEN"), source
        missing = deploy(caller, "attack", mounts=[f"{roots}/nosuch:/x"])
        assert (missing.status_code, missing.json()["reason"]) == (400, "INVALID_FIELD")
        allowed = deploy(caller, "twin", mounts=[f"{roots}/there:/x"])
        assert allowed.status_code == 200, allowed.text
    finally:
        for name in links:
            (roots / name).unlink()


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize("where", [None, "far-box"])
async def test_a_terminal_over_ssh(stub: Any, node: str, caller: httpx.Client, where: str | None) -> None:
    """On the host and in a container there: size, Ctrl-C, exit code."""
    if where is not None:
        assert deploy(caller, where, command="sleep 10000").status_code == 200
    typist = Typist(stub, node, "sh", container_name=where, tty=True, rows=40, columns=111)
    await typist.types("stty size")
    await typist.sees("40 111")
    await typist.resize(50, 120)
    await typist.types('until [ "$(stty size)" = "50 120" ]; do sleep 0.1; done; echo it-"is"')
    await typist.sees("it-is")
    # Said by the program itself: only now it has the terminal.
    await typist.types("sh -c 'echo so-\"far\"; exec sleep 1000'")
    await typist.sees("so-far")
    await typist.types('echo code "$?"; exit 7', before="\x03")
    await typist.sees("code 130")
    assert await typist.exit_code() == 7


@pytest.mark.usefixtures("clean")
async def test_input_and_exit_of_a_program_in_a_container_over_ssh(stub: Any, node: str, caller: httpx.Client) -> None:
    assert deploy(caller, "far-box", command="sleep 10000").status_code == 200
    call = stub.ExecStream()
    command = fleet_pb2.ExecStart(command="sh -c 'cat; echo err >&2; exit 9'", container_name="far-box")
    await call.write(Frame(node_id=node, start=command))
    await call.write(Frame(stdin=b"in"))
    await call.write(Frame(close_stdin=fleet_pb2.CloseStdin()))
    assert await ended(call) == (b"in", b"err\n", 9)


def test_more_programs_at_once_than_one_connection_takes(node: str, caller: httpx.Client, host: SshHost) -> None:
    come, go = host.folder / "come", host.folder / "go"
    waits = f"echo >> {come}; while [ ! -e {go} ]; do sleep 0.1; done; echo done"

    def run(_: int) -> Any:
        asked = {"command": waits, "shell": True, "timeout_seconds": 300}
        return caller.post(f"/api/fleet/exec/{node}", json=asked).json()

    with ThreadPoolExecutor(ENOUGH) as callers:
        asked = [callers.submit(run, number) for number in range(ENOUGH)]
        try:
            wait_until_now(lambda: come.exists() and len(come.read_text()) == ENOUGH, seconds=SECONDS)
        finally:
            go.touch()
        assert [one.result().get("stdout") for one in asked] == ["done\n"] * ENOUGH


@pytest.mark.usefixtures("clean")
def test_what_runs_too_long_in_a_container_over_ssh_is_killed(node: str, caller: httpx.Client) -> None:
    assert deploy(caller, "far-box", command="sleep 10000").status_code == 200
    inside = {"container_name": "far-box"}
    slow = caller.post(
        f"/api/fleet/exec/{node}", json={"command": "sh -c 'sleep 604 & sleep 604'", "timeout_seconds": 1, **inside}
    )
    assert (slow.status_code, slow.json()["reason"]) == (504, "TIMEOUT")

    def left() -> str:
        found = caller.post(f"/api/fleet/exec/{node}", json={"command": "ps -o args", **inside}).json()
        return str(found["stdout"])

    wait_until_now(lambda: "604" not in left())
    assert "sleep 10000" in left()


def test_a_host_without_docker_says_so_and_does_the_rest(
    node: str, caller: httpx.Client, host: SshHost, engine: DockerDaemon
) -> None:
    host.docker.unlink()
    try:
        for refused in (deploy(caller, "app"), caller.get(f"/api/fleet/logs/{node}/x")):
            assert (refused.status_code, refused.json()["reason"]) == (503, "DOCKER_UNAVAILABLE"), refused.text
            assert f"/var/run/docker.sock of root@{host.address}" in refused.json()["detail"]
        assert caller.post(f"/api/fleet/exec/{node}", json={"command": "echo fine"}).json()["stdout"] == "fine\n"
    finally:
        host.docker.symlink_to(engine.socket)
    assert caller.get(f"/api/fleet/logs/{node}/x").json()["reason"] == "CONTAINER_NOT_FOUND"


def test_what_a_lost_connection_hides_is_unknown_and_not_repeated(
    node: str, caller: httpx.Client, host: SshHost
) -> None:
    file = host.folder / "begun"
    body = {"command": f"sh -c 'echo line >> {file}; sleep 600'", "request_id": "cut-off"}
    with ThreadPoolExecutor(1) as callers:
        asked = callers.submit(caller.post, f"/api/fleet/exec/{node}", json=body)
        wait_until_now(lambda: file.exists() and file.read_text(), seconds=SECONDS)
        host.cut()
        lost = asked.result()
    assert (lost.status_code, lost.json()["reason"]) == (500, "OUTCOME_UNKNOWN"), lost.text
    wait_until_now(lambda: status(caller, node) == "online", seconds=SECONDS)
    again = caller.post(f"/api/fleet/exec/{node}", json=body)
    assert (again.status_code, again.json()["reason"]) == (500, "OUTCOME_UNKNOWN"), again.text
    assert file.read_text() == "line\n"


def test_another_host_key_is_not_believed(caller: httpx.Client, host: SshHost, fleet: FleetProcess) -> None:
    other = host.identity.with_suffix(".pub").read_text()
    assert caller.post("/api/nodes", json=wish(host, "fooled", host_key=other)).status_code == 200
    wait_until_now(lambda: "shows another host key" in fleet.log.read_text(), seconds=SECONDS)
    assert status(caller, "fooled") == "down"
    refused = caller.post("/api/fleet/exec/fooled", json={"command": "id"})
    assert (refused.status_code, refused.json()["reason"]) == (503, "NODE_OFFLINE")
    assert caller.delete("/api/nodes/fooled").status_code == 200


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"host_key": "nonsense"}, "INVALID_FIELD"),
        ({"address": "-oProxyCommand=id"}, "INVALID_FIELD"),
        ({"user": "root x"}, "INVALID_FIELD"),
        ({"node_id": "tokens"}, "INVALID_FIELD"),
        ({"node_id": "plain"}, "NAME_IN_USE"),
    ],
)
def test_bad_wishes_are_refused(
    node: str, caller: httpx.Client, host: SshHost, changes: dict[str, Any], reason: str
) -> None:
    assert caller.post("/api/nodes", json={**wish(host, "other"), **changes}).json()["reason"] == reason


def test_an_ssh_node_is_deleted_while_it_is_online(node: str, caller: httpx.Client, fleet: FleetProcess) -> None:
    gone = caller.delete(f"/api/nodes/{node}")
    assert (gone.status_code, gone.json()["node_id"]) == (200, node)
    assert caller.get(f"/api/nodes/{node}").status_code == 404
    wait_until_now(lambda: fleet.pids("fleet_agent.ssh") == [])
