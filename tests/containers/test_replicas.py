"""Two servers: a node is told what to do by either, whichever holds its stream."""

from __future__ import annotations

import subprocess
import sys

from fleet_client import FleetCommander

from tests.e2e.fleet_process import clean_environment
from tests.e2e.test_crashes import until
from tests.e2e.test_replicas import Pair, pair

__all__ = ["pair"]


def test_programs_run_through_the_other_server(pair: Pair) -> None:
    with FleetCommander(pair.b.url) as client:
        until(lambda: client.status()["nodes"]["online"] == 1, "the node is online there too")
        until(lambda: _ran(client), "the server is found")
    command = [sys.executable, "-m", "fleet_client", "exec", "-i", "far", "--", "sh", "-c", "cat; exit 6"]
    done = subprocess.run(
        command,
        check=False,
        input=b"through",
        capture_output=True,
        env=clean_environment({"FLEET_URL": pair.b.url}),
        timeout=30,
    )
    assert (done.returncode, done.stdout) == (6, b"through"), done.stderr


def _ran(client: FleetCommander) -> bool:
    """A server tells its door when it has started."""
    reply = client.call("POST", "/api/fleet/exec/far", json={"command": "echo done"})
    return bool(reply.json()["stdout"] == "done\n")
