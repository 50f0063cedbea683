"""What `fleet up` refuses to start with, and what a stop and a start leave and find."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from fleet_client import FleetCommander

from tests.e2e.fleet_process import FAST, FleetProcess, clean_environment
from tests.waiting import wait_until_now

SMALL: dict[str, Any] = {"prompt": "a sunset", "width": 64, "height": 64, "steps": 1}


def fleet_up(folder: Path, *words: str, **settings: str) -> tuple[int, str]:
    """A `fleet up` that is to be refused: its exit code and what it says."""
    done = subprocess.run(
        [sys.executable, "-m", "fleet_client", "up", "--data-dir", str(folder), *words],
        check=False,
        capture_output=True,
        text=True,
        env=clean_environment({**FAST, **settings}),
        timeout=150,
    )
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    return done.returncode, done.stderr


def test_a_door_for_others_needs_a_key(short_path: Path) -> None:
    for host in ("0.0.0.0", "::", "192.0.2.1"):
        code, told = fleet_up(short_path / "data", FLEET_HOST=host)
        assert code == 2
        assert "FLEET_HOST" in told and "FLEET_API_KEY" in told
    code, told = fleet_up(short_path / "data", "--host", "0.0.0.0", FLEET_API_KEY="fleet-commander-2024")
    assert code == 2
    assert "FLEET_API_KEY" in told and "fleet-commander-2024" not in told
    assert not (short_path / "data").exists()


@pytest.mark.parametrize(
    ("words", "settings", "named"),
    [
        (["--port", "70000"], {}, "port"),
        ([], {"FLEET_PORT": "eighty"}, "port"),
        ([], {"FLEET_API_KEY": "  "}, "api_key"),
        ([], {"FLEET_LOG_LEVEL": "loud"}, "log_level"),
    ],
)
def test_bad_settings_are_named(
    short_path: Path, words: Sequence[str], settings: Mapping[str, str], named: str
) -> None:
    code, told = fleet_up(short_path / "data", *words, **settings)
    assert code == 2
    assert named in told


@pytest.mark.parametrize("flag", ["--port", "--grpc-port"])
def test_a_taken_port_is_named_with_its_flag(short_path: Path, flag: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        words = {"--port": "0", "--grpc-port": "0", flag: str(port)}
        code, told = fleet_up(short_path / "data", *(word for pair in words.items() for word in pair))
    assert code == 1
    assert str(port) in told
    assert re.search(rf"(?<!-){flag}\b", told)
    assert flag.removeprefix("--").replace("-", "_").upper().join(("FLEET_", "")) in told


def test_a_second_server_on_the_folder_is_refused(fleet: FleetProcess) -> None:
    code, told = fleet_up(fleet.folder, "--port", "0", "--grpc-port", "0")
    assert code == 1
    assert f"pid {fleet.pid}" in told and "--data-dir" in told
    assert httpx.get(f"{fleet.url}/health", timeout=60).status_code == 200


def test_a_stop_leaves_nothing_running_and_a_start_finds_all_again(short_path: Path) -> None:
    folder = short_path / "data"
    folder.mkdir(mode=0o755)
    with FleetProcess(folder) as first, FleetCommander(first.url) as client:
        made = client.wait(client.queue_job(**SMALL)["job_id"])
        filename = made["result"]["outputs"][0]["filename"]
        data = client.get_output(filename)
        waiting = client.submit_job({"job_type": "custom", "payload": {"n": 1}})["job_id"]
        processes = [psutil.Process(first.pid), *first.children()]
        assert len(processes) >= 3
        assert first.stop() == 0
        wait_until_now(lambda: not [process for process in processes if running(process)])
    with FleetProcess(folder) as second, FleetCommander(second.url) as client:
        jobs = {job["job_id"]: job["status"] for job in client.list_jobs()["jobs"]}
        assert jobs == {made["job_id"]: "succeeded", waiting: "queued"}
        assert [image["filename"] for image in client.get_gallery()["images"]] == [filename]
        assert client.get_output(filename) == data
        assert private(folder)


def running(process: psutil.Process) -> bool:
    """Whether it is there, and not only its number, which goes when its parent has taken notice."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def private(folder: Path) -> bool:
    """Whether others can read nothing below a folder that they may enter."""
    for path in folder.iterdir():
        assert path.lstat().st_mode & 0o077 == 0, (path, oct(path.lstat().st_mode))
    return True


def test_a_new_folder_is_its_owners_alone(fleet: FleetProcess) -> None:
    assert fleet.folder.stat().st_mode & 0o077 == 0
