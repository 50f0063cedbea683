"""Nodes without an agent: added by address, reached over Debian's sshd, answering as an agent's would."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.e2e.fleet_process import FleetProcess
from tests.nodes.sshd import SshHost, ssh_host
from tests.waiting import wait_until_now


@pytest.fixture(scope="module")
def host() -> Iterator[SshHost]:
    with ssh_host(2) as opened:
        yield opened


@pytest.fixture(scope="module")
def fleet(host: SshHost) -> Iterator[FleetProcess]:
    with FleetProcess(host.folder / "data", "--no-agent") as opened:
        yield opened


@pytest.fixture
def caller(fleet: FleetProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=fleet.url, timeout=40) as client:
        yield client


def wish(host: SshHost, node_id: str, **changes: Any) -> dict[str, Any]:
    return {"node_id": node_id, "address": host.address, "user": "root", "host_key": host.host_key, **changes}


def status(caller: httpx.Client, node_id: str) -> str:
    word: str = caller.get(f"/api/nodes/{node_id}").json()["status"]
    return word


@pytest.fixture(scope="module")
def node(host: SshHost, fleet: FleetProcess) -> str:
    """The host as a node, online once it lets the server's key in."""
    with httpx.Client(base_url=fleet.url, timeout=40) as caller:
        made = caller.post("/api/nodes", json=wish(host, "plain", labels={"zone": "b"}, clusters=["lab"])).json()
        assert (made["transport"], made["status"], made["address"]) == ("ssh", "down", host.address)
        assert (made["labels"], made["clusters"]) == ({"zone": "b"}, ["lab"])
        (warning,) = made["warnings"]
        host.let_in(warning.partition(": ")[2])
        wait_until_now(lambda: status(caller, "plain") == "online", seconds=40)
    return "plain"


def test_an_ssh_node_describes_itself_and_takes_no_jobs(node: str, caller: httpx.Client, host: SshHost) -> None:
    seen = caller.get(f"/api/nodes/{node}").json()
    assert (seen["transport"], seen["slots"], seen["os"], seen["address"]) == ("ssh", 0, "linux", host.address)
    assert seen["host"]["memory_total_bytes"] > 0
    assert seen["metrics_source"] == "none"
    assert any("nvidia-smi" in warning for warning in seen["warnings"]), "what is missing is said"


def test_exec_over_ssh_answers_as_through_an_agent(node: str, caller: httpx.Client) -> None:
    def run(command: str, **more: Any) -> Any:
        return caller.post(f"/api/fleet/exec/{node}", json={"command": command, **more})

    done = run("sh -c 'ip -4 -o addr show eth0; echo to stderr >&2; exit 3'").json()
    assert (done["exit_code"], done["stderr"]) == (3, "to stderr\n")
    assert "10.91.2.2" in done["stdout"], "it ran there"
    missing = run("no-such-program --x").json()
    assert missing["exit_code"] == 127
    assert "no-such-program" in missing["stderr"]
    assert run("printenv GREETING", env={"GREETING": "it's $HOME"}).json()["stdout"] == "it's $HOME\n"
    assert run("echo $HOME; echo 'a b'", shell=True).json()["stdout"] == "/root\na b\n"
    assert run("echo $(id) ; rm").json()["stdout"] == "$(id) ; rm\n", "no shell looks at it"
    big = run("head -c 3000000 /dev/zero").json()
    assert (len(big["stdout"]), big["truncated"]) == (1 << 20, True)
    slow = run("sleep 600", timeout_seconds=1)
    assert (slow.status_code, slow.json()["reason"]) == (504, "TIMEOUT")
    assert "sleep 600" not in run("ps -eo args", shell=False).json()["stdout"], "what ran too long is ended"


def test_the_same_command_takes_effect_once(node: str, caller: httpx.Client, host: SshHost) -> None:
    file = host.folder / "lines"
    body = {"command": f"sh -c 'echo line >> {file}'", "request_id": "just-once"}
    first = caller.post(f"/api/fleet/exec/{node}", json=body).json()
    again = caller.post(f"/api/fleet/exec/{node}", json=body).json()
    assert first == again
    assert file.read_text() == "line\n"


def test_another_host_key_is_not_believed(caller: httpx.Client, host: SshHost, fleet: FleetProcess) -> None:
    other = host.identity.with_suffix(".pub").read_text()
    assert caller.post("/api/nodes", json=wish(host, "fooled", host_key=other)).status_code == 200
    wait_until_now(lambda: "shows another host key" in fleet.log.read_text(), seconds=30)
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
