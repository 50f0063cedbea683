"""What dispatch decided is decided again from its record, alike; and agents saw nothing that was not decided."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import orjson
import pytest
from fleet_client.cli.app import build
from typer.testing import CliRunner, Result

from fleet_server.services.decisions import BadRecordError, read_decisions, replay
from tests.e2e.fleet_process import FleetProcess, clean_environment


@dataclass
class Recorded:
    """A run of the simulator against a server that wrote its decisions down."""

    decisions: Path
    seen: Path

    @property
    def lines(self) -> list[bytes]:
        return self.decisions.read_bytes().splitlines(keepends=True)


def fleet(*words: str) -> Result:
    """In this process: to start another would take longer than what it does."""
    return CliRunner().invoke(build(words[0]), words, env={"NO_COLOR": "1"}, catch_exceptions=False)


@pytest.fixture(scope="module")
def recorded() -> Iterator[Recorded]:
    with tempfile.TemporaryDirectory(prefix="fleet-") as name:
        folder = Path(name)
        files = Recorded(folder / "decisions.jsonl", folder / "seen.jsonl")
        settings = {"FLEET_DECISIONS_FILE": str(files.decisions)}
        with FleetProcess(folder / "data", "--no-agent", environment=settings) as server:
            address = f"127.0.0.1:{server.grpc_port}"
            words = ["--nodes", "15", "--server", address, "--speed", "60", "--arrival", "0.2", "--seed", "5"]
            load = ["--jobs", "60", "--rate", "60", "--faults", "oom=0.1", "--record", str(files.seen)]
            # In a process of its own, as it takes the logs and the random numbers of the one that it has.
            command = [sys.executable, "-m", "fleet_client", "simulate", *words, *load]
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=170, env=clean_environment(), check=False
            )
            assert done.returncode == 0, done.stderr
        yield files


def test_every_decision_is_made_again_alike(recorded: Recorded) -> None:
    found = replay(recorded.lines)
    assert found.differences == []
    assert found.decisions == len(recorded.lines) > 1 and found.placed >= 60
    done = fleet("replay", str(recorded.decisions), "--seen", str(recorded.seen))
    assert done.exit_code == 0, done.stdout + done.stderr
    assert ": 0 differ\n" in done.stdout and ": 0 were never decided\n" in done.stdout


def test_nodes_are_written_where_they_have_changed(recorded: Recorded) -> None:
    """And are whole when read."""
    lines = [orjson.loads(line) for line in recorded.lines]
    looked_at = [{one.node_id: one for one in decision.situation.nodes} for decision in read_decisions(recorded.lines)]
    assert max(map(len, looked_at)) == 15
    assert [line["fresh"] for line in lines] == [True] + [False] * (len(lines) - 1)
    for line, before, now in zip(lines, [{}, *looked_at], looked_at, strict=False):
        assert {one["node_id"] for one in line["nodes"]} == {name for name in now if before.get(name) != now[name]}


def test_a_decision_that_would_not_be_made_is_reported(recorded: Recorded, tmp_path: Path) -> None:
    lines = recorded.lines
    number = next(index for index, line in enumerate(lines) if orjson.loads(line)["plan"]["placed"])
    changed = orjson.loads(lines[number])
    changed["plan"]["placed"][0]["node_id"] = "sim-elsewhere"
    bent = tmp_path / "bent.jsonl"
    bent.write_bytes(b"".join([*lines[:number], orjson.dumps(changed) + b"\n", *lines[number + 1 :]]))
    done = fleet("replay", str(bent))
    assert done.exit_code == 1
    assert ": 1 differ\n" in done.stdout and f"decision {number + 1}: placed: was " in done.stdout
    printed = orjson.loads(fleet("replay", str(bent), "--json").stdout)
    assert (printed["decisions"], len(printed["differences"]), printed["undecided"]) == (len(lines), 1, [])


def test_an_assignment_that_was_never_decided_is_reported(recorded: Recorded, tmp_path: Path) -> None:
    seen = tmp_path / "seen.jsonl"
    stranger = {"what": "assign", "node_id": "sim-elsewhere", "model": "custom"}
    seen.write_text(recorded.seen.read_text() + json.dumps(stranger) + "\n")
    done = fleet("replay", str(recorded.decisions), "--seen", str(seen))
    assert done.exit_code == 1
    assert "1 were never decided" in done.stdout and "sim-elsewhere: 1 of custom not decided" in done.stdout


def test_files_that_are_no_records_are_named(recorded: Recorded, tmp_path: Path) -> None:
    with pytest.raises(BadRecordError, match="line 2 is no decision"):
        replay([recorded.lines[0], b'{"fresh": true}\n'])
    done = fleet("replay", str(tmp_path / "none"))
    assert (done.exit_code, done.stdout) == (2, "")
    assert "No such file or directory" in done.stderr
    done = fleet("replay", str(recorded.decisions), "--seen", str(recorded.decisions))
    assert done.exit_code == 2 and "simulate --record" in done.stderr
