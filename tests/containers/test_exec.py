"""Programs on a node and in containers, as documented and beyond."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import docker
import httpx
import psutil
import pytest

from tests.containers.conftest import NODE
from tests.docker_daemon import IMAGE
from tests.waiting import wait_until_now

pytestmark = pytest.mark.usefixtures("clean")


def executed(door: httpx.Client, command: str, status: int = 200, **fields: Any) -> dict[str, Any]:
    reply = door.post(f"/api/fleet/exec/{NODE}", json={"command": command, **fields})
    assert reply.status_code == status, reply.text
    found: dict[str, Any] = reply.json()
    return found


@pytest.fixture
def box(door: httpx.Client) -> dict[str, Any]:
    """A container that sleeps; where to run what."""
    body = {"node_id": NODE, "image": IMAGE, "name": "box", "command": "sleep 10000", "env": {"KIND": "box"}}
    assert door.post("/api/fleet/deploy", json=body).status_code == 200
    return {"container_name": "box"}


def _places(box: dict[str, Any]) -> list[dict[str, Any]]:
    """On the node, and in the container."""
    return [{}, box]


def test_a_command_on_the_node(door: httpx.Client) -> None:
    found = executed(door, "sh -c 'echo out; echo err >&2; exit 3'")
    assert (found["exit_code"], found["stdout"], found["stderr"]) == (3, "out\n", "err\n")
    assert (found["node_id"], found["container_name"], found["truncated"]) == (NODE, None, False)
    assert executed(door, "id -u")["stdout"] == f"{os.getuid()}\n"
    # Words, not a shell: nothing is expanded.
    assert executed(door, "echo $HOME; id")["stdout"] == "$HOME; id\n"
    assert executed(door, "echo $HOME; id -u", shell=True)["stdout"].splitlines()[1] == str(os.getuid())
    assert executed(door, "printenv COLOUR", env={"COLOUR": "blue"})["stdout"] == "blue\n"


def test_a_missing_program_is_127_with_its_reason(door: httpx.Client, box: dict[str, Any]) -> None:
    for place in _places(box):
        found = executed(door, "nosuch-program --flag", **place)
        assert found["exit_code"] == 127
        assert "nosuch-program" in found["stderr"]
        assert found["stdout"] == ""


def test_bad_commands_are_refused(door: httpx.Client, box: dict[str, Any]) -> None:
    for command in ("", "'unbalanced", "nul\0", "x" * 8193, "''"):
        said = executed(door, command, 400)
        assert said["code"] == "INVALID_ARGUMENT", said
        assert said["detail"].startswith("command"), said
    assert executed(door, "true", 400, timeout_seconds=601)["detail"].startswith("timeout_seconds")
    assert executed(door, "true", 404, container_name="nosuch")["reason"] == "CONTAINER_NOT_FOUND"
    nowhere = door.post("/api/fleet/exec/nowhere", json={"command": "true"})
    assert (nowhere.status_code, nowhere.json()["reason"]) == (404, "NODE_NOT_FOUND")


def test_in_a_container(door: httpx.Client, box: dict[str, Any], dockerd: docker.DockerClient) -> None:
    found = executed(door, "sh -c 'echo $KIND $MORE; echo err >&2; exit 4'", env={"MORE": "yes"}, **box)
    assert (found["exit_code"], found["stdout"], found["stderr"]) == (4, "box yes\n", "err\n")
    assert found["container_name"] == "box"
    dockerd.containers.get("box").stop(timeout=0)
    assert executed(door, "true", 409, **box)["reason"] == "CONTAINER_NOT_RUNNING"


def test_the_agents_own_settings_are_hidden(door: httpx.Client) -> None:
    names = [line.partition("=")[0] for line in executed(door, "env")["stdout"].splitlines()]
    assert [name for name in names if name.startswith("FLEET_")] == ["FLEET_COMMAND_ID"]


def test_text_that_is_no_utf_8_and_output_that_is_too_long(door: httpx.Client, box: dict[str, Any]) -> None:
    assert executed(door, "printf 'a\\377b'", shell=True)["stdout"] == "a\ufffdb"
    for place in _places(box):
        found = executed(door, "sh -c 'yes | head -c 3000000'", **place)
        assert found["truncated"] is True
        assert len(found["stdout"]) == 1 << 20
        assert found["exit_code"] == 0


def test_what_runs_too_long_is_killed_with_all_that_it_started(door: httpx.Client, box: dict[str, Any]) -> None:
    # A sleep that no other run of these tests has.
    naps = str(10_000_000 + os.getpid())
    apart = f'import os, subprocess; subprocess.Popen(["sleep", "{naps}"], preexec_fn=os.setpgrp).wait()'
    programs = (f"{sys.executable} -c '{apart}'", f"sh -c 'sleep {naps} & sleep {naps}'")
    for place, program in zip(_places(box), programs, strict=True):
        said = executed(door, program, 504, timeout_seconds=2, **place)
        assert said["reason"] == "TIMEOUT"
        wait_until_now(lambda: not [one for one in psutil.process_iter() if _is(one, naps)])


def _is(process: psutil.Process, word: str) -> bool:
    try:
        return word in process.cmdline()
    except psutil.Error:
        return False


def test_a_daemon_that_holds_the_output_is_not_waited_for(door: httpx.Client, tmp_path: Path) -> None:
    found = executed(door, f"sh -c 'sleep 500 & echo $! > {tmp_path}/pid; echo done'", timeout_seconds=400)
    assert found["stdout"] == "done\n"
    assert found["duration_seconds"] < 300
    os.kill(int((tmp_path / "pid").read_text()), 9)


def test_the_same_key_runs_once(door: httpx.Client, tmp_path: Path) -> None:
    command = {"command": f"sh -c 'echo line >> {tmp_path}/file; echo said'"}
    for _ in range(3):
        reply = door.post(f"/api/fleet/exec/{NODE}", json=command, headers={"Idempotency-Key": str(tmp_path)})
        assert reply.json()["stdout"] == "said\n"
    assert (tmp_path / "file").read_text() == "line\n"
