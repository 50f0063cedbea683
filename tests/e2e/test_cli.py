"""The command `fleet` against a real fleet."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from fleet_client import ApiError, FleetCommander
from PIL import Image

from tests.e2e.commands import Terminal, fleet_command, fleet_process
from tests.e2e.fleet_process import FleetProcess
from tests.ports import free_ports

SMALL = ("--width", "128", "--height", "64", "--steps", "4")
SLOW = ("--width", "2048", "--height", "2048", "--steps", "150")


@pytest.fixture
def client(fleet: FleetProcess) -> Iterator[FleetCommander]:
    with FleetCommander(fleet.url) as client:
        yield client


def said(fleet: FleetProcess, *words: str, given: Any = None) -> Any:
    """The JSON that a command prints; it must succeed."""
    data = None if given is None else json.dumps(given).encode()
    done = fleet_command(*words, "--json", url=fleet.url, given=data)
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def test_generate(fleet: FleetProcess, tmp_path: Path) -> None:
    target = str(tmp_path / "out.png")
    done = fleet_command("generate", "a sunset", "-o", target, "--seed", str((1 << 64) - 1), *SMALL, url=fleet.url)
    assert done.exit_code == 0, done.stderr
    assert re.fullmatch(rf"{re.escape(target)}  128x64, seed {(1 << 64) - 1}, .* on \S+\n", done.stdout)
    with Image.open(tmp_path / "out.png") as image:
        assert image.size == (128, 64)
    assert done.stderr.splitlines()[-1].endswith(": succeeded")


def test_generate_json(fleet: FleetProcess, tmp_path: Path) -> None:
    made = said(fleet, "generate", "a night", "-o", str(tmp_path), "--seed", "7", *SMALL)
    assert (made["width"], made["height"], made["seed"]) == (128, 64, 7)
    path = Path(made["path"])
    assert path == tmp_path / made["filename"]
    assert path.stat().st_size == made["size_bytes"]


def test_generate_shows_progress_and_the_picture_in_the_making(fleet: FleetProcess, tmp_path: Path) -> None:
    size = ("--width", "1024", "--height", "1024", "--steps", "150")
    with Terminal("generate", "a sunset", "-o", "a.png", *size, url=fleet.url, folder=tmp_path) as terminal:
        assert terminal.end() == 0
        shown = terminal.shown
    assert re.search(r"step \d+ of 150", shown)
    assert "━━━" in shown
    # Pictures came while it ran, and the last one stays.
    first = shown.index("▀")
    assert first < shown.rindex("of 150")
    assert re.search(r"\x1b\[38;2;\d+;\d+;\d+;48;2;\d+;\d+;\d+m▀", shown)
    assert "a.png  1024x1024, seed " in shown


def test_ctrl_c_cancels_the_job(fleet: FleetProcess, client: FleetCommander, tmp_path: Path) -> None:
    with Terminal("generate", "to be left", "-o", "a.png", *SLOW, url=fleet.url, folder=tmp_path) as terminal:
        terminal.read_until(lambda shown: re.search(r"running|step \d", shown))
        terminal.press(b"\x03")
        assert terminal.end() == 130
    job_id = re.findall(r"job (\S+) is cancelled", terminal.shown)[0]
    job = client.get_job(job_id)
    assert (job["status"], job["payload"]["prompt"]) == ("cancelled", "to be left")
    assert not (tmp_path / "a.png").exists()


def test_ctrl_c_leaves_a_watched_job_alone(fleet: FleetProcess, client: FleetCommander, tmp_path: Path) -> None:
    job_id = client.queue_job("watched", width=2048, height=2048, steps=150)["job_id"]
    with Terminal("jobs", "watch", job_id, url=fleet.url, folder=tmp_path) as terminal:
        terminal.read_until(lambda shown: re.search(r"queued|running|step \d", shown))
        terminal.press(b"\x03")
        assert terminal.end() == 130
    assert client.get_job(job_id)["status"] in ("queued", "running", "succeeded")
    with suppress(ApiError):
        client.cancel_job(job_id)


def test_jobs(fleet: FleetProcess, client: FleetCommander) -> None:
    job = {"job_type": "image_gen", "payload": {"prompt": "p", "width": 64, "height": 64, "steps": 1}}
    receipt = said(fleet, "jobs", "submit", "-", given=job)
    assert receipt["status"] == "queued"
    watched = fleet_command("jobs", "watch", receipt["job_id"], "--json", url=fleet.url)
    assert watched.exit_code == 0
    events = [json.loads(line) for line in watched.stdout.splitlines()]
    assert events[-1]["type"] == "job_complete"
    assert said(fleet, "jobs", "show", receipt["job_id"])["status"] == "succeeded"
    shown = fleet_command("jobs", "show", receipt["job_id"], url=fleet.url).stdout
    assert re.search(r"^status +succeeded$", shown, re.MULTILINE)
    assert re.search(r"^payload +prompt: p$", shown, re.MULTILINE)
    listed = fleet_command("jobs", "list", "--status", "succeeded", url=fleet.url).stdout
    assert re.search(rf"^{receipt['job_id']}  image_gen  succeeded  normal +100 %", listed, re.MULTILINE)


def test_a_batch_and_its_cancellation(fleet: FleetProcess) -> None:
    batch = [{"job_type": "custom", "payload": {"n": n}, "priority": "low"} for n in range(3)]
    receipts = said(fleet, "jobs", "submit", "-", "--request-id", "batch-of-the-cli", given=batch)["jobs"]
    again = said(fleet, "jobs", "submit", "-", "--request-id", "batch-of-the-cli", given=batch)["jobs"]
    assert [one["job_id"] for one in again] == [one["job_id"] for one in receipts]
    waiting = said(fleet, "jobs", "list", "--job-type", "custom", "--priority", "low", "--status", "queued")["jobs"]
    assert {one["job_id"] for one in receipts} <= {one["job_id"] for one in waiting}
    assert said(fleet, "jobs", "stats")["jobs"]["queued"] >= 3
    stats = fleet_command("jobs", "stats", url=fleet.url).stdout
    assert re.search(r"^compute +custom", stats, re.MULTILINE)
    for receipt in receipts:
        assert said(fleet, "jobs", "cancel", receipt["job_id"])["status"] == "cancelled"
    watched = fleet_command("jobs", "watch", receipts[0]["job_id"], url=fleet.url)
    assert watched.exit_code == 1
    assert "cancelled" in watched.stderr


def test_retry(fleet: FleetProcess) -> None:
    slow = {"prompt": "slow", "width": 2048, "height": 2048, "steps": 150}
    job = {"job_type": "image_gen", "payload": slow, "timeout_seconds": 1, "max_retries": 0}
    job_id = said(fleet, "jobs", "submit", "-", given=job)["job_id"]
    failed = fleet_command("jobs", "watch", job_id, url=fleet.url)
    assert failed.exit_code == 1
    assert "error: TIMEOUT: " in failed.stderr
    again = said(fleet, "jobs", "retry", job_id)
    # Queued, and by the time of this answer perhaps at work again.
    assert (again["job_id"], again["generation"]) == (job_id, 2)
    fleet_command("jobs", "cancel", job_id, url=fleet.url)
    # Not that job: by now it may have failed once more. This one waits for an engine that nobody has.
    waiting = said(fleet, "jobs", "submit", "-", given={"job_type": "custom", "payload": {}})["job_id"]
    fleet_command("jobs", "cancel", waiting, url=fleet.url)
    refused = fleet_command("jobs", "retry", waiting, url=fleet.url)
    assert refused.exit_code == 1
    assert "only a failed one can be retried" in refused.stderr


def test_nodes_models_status_version(fleet: FleetProcess) -> None:
    node = said(fleet, "nodes", "list")["nodes"][0]
    assert said(fleet, "nodes", "show", node["node_id"])["node_id"] == node["node_id"]
    listed = fleet_command("nodes", "list", url=fleet.url).stdout
    assert re.search(rf"^{re.escape(node['node_id'])} +online +\d of \d", listed, re.MULTILINE)
    shown = fleet_command("nodes", "show", node["node_id"], url=fleet.url).stdout
    assert re.search(r"^(engines)? +sketch \S+: ready", shown, re.MULTILINE)
    models = {model["name"] for model in said(fleet, "models")["models"]}
    assert {"sketch", "SDXL_4GB_FP8.safetensors"} <= models
    assert "alias of sketch" in fleet_command("models", url=fleet.url).stdout
    assert said(fleet, "status")["nodes"]["online"] == 1
    words = fleet_command("status", url=fleet.url)
    assert "1 online" in words.stdout and "no diffusion model" in words.stderr
    assert said(fleet, "version") == {"version": "1.0.0"}
    assert fleet_command("version", url=fleet.url).stdout == "1.0.0\n"


def test_gallery_and_download(fleet: FleetProcess, tmp_path: Path) -> None:
    made = said(fleet, "generate", "turquoise lighthouse", "-o", str(tmp_path / "made.png"), *SMALL)
    page = said(fleet, "gallery", "--prompt", "lighthouse")
    assert made["filename"] in [image["filename"] for image in page["images"]]
    row = fleet_command("gallery", "--prompt", "lighthouse", url=fleet.url).stdout.splitlines()[1]
    assert row.split() == [made["filename"], "128x64", str(made["seed"]), *row.split()[3:5], "turquoise", "lighthouse"]
    done = fleet_command("download", made["filename"], "-o", "-", url=fleet.url)
    assert done.stdout_bytes == (tmp_path / "made.png").read_bytes()


def test_events(fleet: FleetProcess, client: FleetCommander) -> None:
    job_id = client.queue_job("seen", width=64, height=64, steps=1)["job_id"]
    client.wait(job_id)
    with fleet_process("events", "--job", job_id, "--since", "0", "--json", url=fleet.url) as process:
        assert process.stdout is not None
        kinds = []
        while "job_complete" not in kinds:
            event = json.loads(process.stdout.readline())
            assert event["data"]["job_id"] == job_id
            kinds.append(event["type"])
        process.send_signal(signal.SIGINT)
        assert process.wait(100) == 130
    assert kinds[0] == "job_update"


def test_a_reader_that_leaves_ends_the_command_quietly(fleet: FleetProcess, client: FleetCommander) -> None:
    client.wait(client.queue_job("seen", width=64, height=64, steps=1)["job_id"])
    for words in ("events --since 0 --json", "events --since 0", "jobs list --json"):
        # The reader is gone before the first byte comes.
        with fleet_process(*words.split(), url=fleet.url, shell='{} | true; exit "${{PIPESTATUS[0]}}"') as process:
            _, errors = process.communicate(timeout=150)
        assert (process.returncode, errors) == (141, b""), words


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("jobs", "show", "nothing"), 4, "there is no job 'nothing'"),
        (("jobs", "watch", "nothing"), 4, "there is no job 'nothing'"),
        (("nodes", "show", "nothing"), 4, "nothing"),
        (("download", "nothing.png"), 4, "gallery"),
        (("generate", "x", "--width", "1001"), 2, "width: must be a multiple of 8"),
        (("generate", "x", "--priority", "urgent"), 2, "priority: "),
        (("generate", "x", "--model", "nothing"), 4, "nothing"),
        (("jobs", "list", "--status", "lost"), 2, "status[0]: "),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else None,
)
def test_exit_codes(fleet: FleetProcess, words: tuple[str, ...], code: int, told: str) -> None:
    done = fleet_command(*words, url=fleet.url)
    assert (done.exit_code, done.stdout) == (code, "")
    assert told in done.stderr


def test_colours_are_for_terminals_that_want_them(fleet: FleetProcess, client: FleetCommander, tmp_path: Path) -> None:
    client.wait(client.queue_job("seen", width=64, height=64, steps=1)["job_id"])
    colour = re.compile(r"\x1b\[[0-9;]*3[0-9]m")
    with Terminal("jobs", "list", url=fleet.url, folder=tmp_path) as terminal:
        assert terminal.end() == 0
    assert colour.search(terminal.shown)
    with Terminal("jobs", "list", url=fleet.url, folder=tmp_path, more={"NO_COLOR": "1"}) as terminal:
        assert terminal.end() == 0
    assert "succeeded" in terminal.shown and not colour.search(terminal.shown)
    words = ("generate", "x", "-o", "x.png", *SMALL)
    with Terminal(*words, url=fleet.url, folder=tmp_path, more={"NO_COLOR": "1"}) as terminal:
        assert terminal.end() == 0
    assert "▀" not in terminal.shown and not colour.search(terminal.shown)


def test_a_command_outlives_a_restart_of_the_server(short_path: Path) -> None:
    (port,) = free_ports(1)
    command = ("up", "--port", str(port), "--grpc-port", "0", "--no-agent")
    with FleetProcess(short_path / "data", command=command) as first:
        url = first.url
        with FleetCommander(url) as client:
            job_id = client.submit_job({"job_type": "custom", "payload": {}})["job_id"]
        watching = fleet_process("jobs", "watch", job_id, url=url)
        assert watching.stderr is not None
        assert b"waiting" in watching.stderr.readline()
        assert first.stop() == 0
    with watching, FleetProcess(short_path / "data", command=command):
        with FleetCommander(url) as client:
            client.cancel_job(job_id)
        assert watching.wait(150) == 1
        assert b"was cancelled" in watching.stderr.read()
