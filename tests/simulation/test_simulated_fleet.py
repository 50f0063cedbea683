"""Simulated agents on a real server: they work, and all come back when the server is killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from fleet_client.cli.app import build
from typer.testing import CliRunner

from fleet_agent.simulation.faults import Faults
from fleet_agent.simulation.load import Load
from fleet_agent.simulation.profiles import PROFILES
from fleet_agent.simulation.simulation import Plan, Simulation
from fleet_agent.simulation.slot import Pace
from fleet_agent.simulation.summary import summary
from tests.e2e.fleet_process import FleetProcess, clean_environment
from tests.ports import free_ports
from tests.waiting import wait_until

AGENTS = 40
QUICK = {"FLEET_LEASE_SECONDS": "30", "FLEET_REAP_GRACE_SECONDS": "60"}


@contextlib.contextmanager
def running() -> Iterator[FleetProcess]:
    port, grpc_port = free_ports(2)
    command = ("up", "--no-agent", "--port", str(port), "--grpc-port", str(grpc_port))
    with (
        tempfile.TemporaryDirectory(prefix="fleet-") as folder,
        FleetProcess(Path(folder) / "data", environment=QUICK, command=command) as process,
    ):
        yield process


@pytest.fixture(scope="module")
def server() -> Iterator[FleetProcess]:
    with running() as process:
        yield process


@pytest.fixture
def own_server() -> Iterator[FleetProcess]:
    """For a test that kills it, or leaves work behind."""
    with running() as process:
        yield process


def plan_on(server: FleetProcess, *, faults: Faults | None = None, seed: int = 7) -> Plan:
    return Plan(
        PROFILES["mixed"],
        AGENTS,
        f"127.0.0.1:{server.grpc_port}",
        seed=seed,
        pace=Pace(speed=30),
        faults=faults or Faults(),
        arrival_seconds=0.5,
        streams_per_channel=10,
        reconnect_seconds=1.0,
    )


async def test_all_jobs_end_once_and_the_server_knows_every_node(server: FleetProcess) -> None:
    simulation = Simulation(plan_on(server))

    async def until(running: Simulation) -> None:
        await running.drained.wait()

    await simulation.run(Load(rate=100, jobs=120), until)
    values = summary(simulation)
    assert values["jobs"] | {"per_second": 0} == {
        "submitted": 120,
        "refused": 0,
        "succeeded": 120,
        "failed": 0,
        "unfinished": 0,
        "per_second": 0,
    }
    assert set(values["faults_of_the_server"].values()) == {0}
    assert values["dispatch_seconds"]["count"] == 120
    assert sum(one["succeeded"] for one in values["classes"].values()) == 120
    assert sum(one["attempts"] for one in values["placements"].values()) == simulation.tally.assigns


async def test_a_killed_server_gets_all_its_agents_back_and_nothing_is_done_twice(own_server: FleetProcess) -> None:
    server = own_server
    simulation = Simulation(plan_on(server))
    tally = simulation.tally

    async def until(running: Simulation) -> None:
        await running.all_online()
        await wait_until(lambda: tally.running > 3 and tally.done > 10)
        await asyncio.to_thread(server.kill)
        await tally.someone_offline.wait()
        await asyncio.to_thread(server.start)
        await running.all_online()
        done = tally.done
        await wait_until(lambda: tally.done > done + 10)
        running.stop_jobs()
        await running.drained.wait()

    await simulation.run(Load(rate=15), until)
    assert len(tally.welcomes) == 2 * AGENTS
    assert (tally.healthy_kills, tally.overlaps, tally.done_twice, tally.failed_jobs) == (0, 0, 0, 0)
    assert tally.done == tally.submitted


async def test_faults_hurt_and_nothing_is_lost_by_them(own_server: FleetProcess) -> None:
    faults = Faults(crash=600, disconnect=600, slow=0.2, engine=0.05, oom=0.05)
    simulation = Simulation(plan_on(own_server, faults=faults))
    tally = simulation.tally

    async def until(running: Simulation) -> None:
        def hurt() -> bool:
            return tally.crashes > 2 and tally.failed_attempts > 3 and len(tally.dials) > AGENTS + 5

        # Who was cut off stays away for up to 45 s.
        await wait_until(lambda: hurt() and tally.done > 60, seconds=150)

    await simulation.run(Load(rate=30), until)
    assert (tally.overlaps, tally.done_twice) == (0, 0)


def test_the_command_prints_what_it_saw_and_records_it(server: FleetProcess, tmp_path: Path) -> None:
    record = tmp_path / "record.jsonl"
    words = ["--nodes", "6", "--profile", "homelab", "--server", f"127.0.0.1:{server.grpc_port}"]
    more = ["--jobs", "12", "--rate", "20", "--speed", "100", "--arrival", "0.2", "--json", "--record", str(record)]
    done = subprocess.run(
        [sys.executable, "-m", "fleet_client", "simulate", *words, *more],
        capture_output=True,
        text=True,
        timeout=50,
        env=clean_environment(),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    assert (values["profile"], values["nodes"]["planned"], values["jobs"]["succeeded"]) == ("homelab", 6, 12)
    seen = [json.loads(line) for line in record.read_text().splitlines()]
    assert sum(1 for one in seen if one["what"] == "assign") == values["attempts"]["assigned"]
    assert {one["node_id"] for one in seen if one["what"] == "online"} == {
        node.node_id for node in Simulation(Plan(PROFILES["homelab"], 6)).nodes
    }


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--profile", "moon"], 2, "--profile: there is no 'moon'; there are mixed, homelab, jetsons"),
        (["--faults", "fire=1"], 2, "--faults: there is no 'fire'"),
        (["--jobs", "5", "--rate", "0"], 2, "--jobs: needs a --rate above 0"),
        (["--record", "/nowhere/x"], 2, "--record: /nowhere/x: No such file or directory"),
    ],
)
def test_bad_arguments_are_named(words: list[str], code: int, says: str) -> None:
    # In this process: to start another would take a hundred times as long.
    done = CliRunner().invoke(build("simulate"), ["simulate", *words])
    assert (done.exit_code, done.stdout) == (code, "")
    assert says in done.stderr


def test_a_seed_settles_fleet_and_jobs() -> None:
    one, same, other = (Simulation(Plan(PROFILES["mixed"], 30, seed=seed)) for seed in (1, 1, 2))
    assert one.nodes == same.nodes != other.nodes
    assert one._jobs.random() == same._jobs.random()
