"""The documented calls of outputs, storage and inputs on a fleet with its own S3; and names that are attacks."""

from __future__ import annotations

import hashlib
import http.client
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fleet_client import FleetCommander
from PIL import Image

from tests import documented
from tests.e2e.commands import fleet_command
from tests.e2e.fleet_process import FleetProcess

SMALL = {"width": 64, "height": 64, "steps": 2}


@pytest.fixture
def client(fleet: FleetProcess) -> Iterator[FleetCommander]:
    with FleetCommander(fleet.url) as opened:
        yield opened


def test_the_documented_life_of_an_output(fleet: FleetProcess, client: FleetCommander, tmp_path: Path) -> None:
    images = [client.generate_image(f"a wood {n}", **SMALL) for n in range(3)]
    filenames = {image.info["filename"] for image in images}
    stats = documented.reply(documented.OUTPUT_STATS, fleet.url, tmp_path)
    assert stats["local"]["files"] >= 3 and stats["sync_interval_seconds"] == 900 and stats["max_age_hours"] == 24
    sweep = documented.reply(documented.SYNC, fleet.url, tmp_path)
    assert sweep["operation"] == "sync" and sweep["failed"] == 0 and filenames <= set(sweep["filenames"])
    listed = documented.reply(documented.LIST_S3, fleet.url, tmp_path)
    assert filenames <= {one["filename"] for one in listed["outputs"]}
    for one in listed["outputs"]:
        assert hashlib.sha256(httpx.get(one["s3_url"], timeout=60).content).hexdigest() == one["sha256"]
    assert documented.reply(documented.LIST_LOCAL, fleet.url, tmp_path)["outputs"]
    assert documented.reply(documented.CLEANUP_DRY, fleet.url, tmp_path)["dry_run"] is True
    done = documented.reply(documented.CLEANUP, fleet.url, tmp_path)
    assert (done["dry_run"], done["deleted"]) == (False, 0)
    moved = documented.reply(documented.MOVE_ALL, fleet.url, tmp_path)
    assert moved["deleted"] >= 3 and moved["failed"] == 0
    assert not [path for path in (fleet.folder / "outputs").iterdir() if path.name in filenames]
    for image in images:
        again = Image.open(io.BytesIO(client.get_output(image.info["filename"])))
        assert again.tobytes() == image.tobytes()
    page = documented.reply(documented.GALLERY, fleet.url, tmp_path)
    assert filenames <= {one["filename"] for one in page["images"]}
    name = sorted(filenames)[0]
    url = f"{fleet.url}/api/vision/outputs/{name}"
    past = httpx.get(url, headers={"range": "bytes=99999999-"}, timeout=60)
    size = client.get_output_metadata(name)["size_bytes"]
    assert (past.status_code, past.headers["content-range"]) == (416, f"bytes */{size}")
    head = httpx.head(url, timeout=60)
    assert (head.status_code, head.headers["content-length"], head.content) == (200, str(size), b"")
    gone = documented.reply(documented.DELETE_OUTPUT, fleet.url, tmp_path, filename=name)
    assert set(gone["removed"]) >= {"s3", "index"} and gone["pending"] == []
    assert httpx.get(url, timeout=60).status_code == 404


def test_a_rerun_paints_the_same_picture(client: FleetCommander) -> None:
    image = client.generate_image("a lighthouse", **SMALL)
    receipt = client.rerun_output(image.info["filename"], priority="high")
    job = client.wait(receipt["job_id"])
    again = Image.open(io.BytesIO(client.get_output(job["result"]["outputs"][0]["filename"])))
    assert again.tobytes() == image.tobytes()


def test_an_input_is_painted_over(fleet: FleetProcess, client: FleetCommander, tmp_path: Path) -> None:
    source = tmp_path / "start.png"
    Image.new("RGB", (64, 64), "red").save(source)
    references = [client.upload_input(source)["reference"]]
    files = {"file": ("x.png", source.read_bytes(), "image/png")}
    part = httpx.post(f"{fleet.url}/api/inputs", files=files, timeout=60).json()
    assert (part["filename"], part["content_type"], part["size_bytes"]) == ("x.png", "image/png", source.stat().st_size)
    references += [part["reference"], f"s3://fleet-workspace/inputs/{part['reference'].removeprefix('input:')}"]
    options = {**SMALL, "seed": 3, "strength": 0.3}
    pictures = [client.generate_image("a sea", init_image=one, **options).tobytes() for one in references]
    assert len(set(pictures)) == 1 and pictures[0] != client.generate_image("a sea", **SMALL, seed=3).tobytes()
    job = client.submit_job({"job_type": "image_gen", "payload": {"prompt": "a", **SMALL, "init_image": references[0]}})
    assert client.wait(job["job_id"])["status"] == "succeeded"


def test_progress_is_told(fleet: FleetProcess, client: FleetCommander) -> None:
    client.generate_image("a hill", **SMALL)
    events = client.watch_events(type="operation_progress", since="0")
    with FleetCommander(fleet.url) as other:
        # The stream is open once its first event is there: syncs are begun until it has told of one.
        over = threading.Event()

        def sync() -> None:
            while not over.wait(0.1):
                other.sync_outputs()

        thread = threading.Thread(target=sync)
        thread.start()
        try:
            event = next(events)
        finally:
            over.set()
            thread.join()
            events.close()
    assert (event["data"]["operation"], event["data"]["message"].endswith("files")) == ("sync", True)


def test_the_commands(fleet: FleetProcess, client: FleetCommander, tmp_path: Path) -> None:
    name = client.generate_image("a brook", **SMALL).info["filename"]
    assert "not in S3 yet" in run(fleet, "outputs", "stats").stdout
    assert json.loads(run(fleet, "outputs", "sync", "--json").stdout)["uploaded"] >= 1
    assert name in run(fleet, "outputs", "list").stdout
    assert name in run(fleet, "outputs", "list", "--local").stdout
    assert "would be removed" in run(fleet, "outputs", "cleanup", "--max-age-hours", "0.0001", "--dry-run").stdout
    assert json.loads(run(fleet, "outputs", "move", "--json").stdout)["failed"] == 0
    assert json.loads(run(fleet, "outputs", "star", name, "--json").stdout)["starred"] is True
    assert name in run(fleet, "gallery", "--starred").stdout
    assert "a brook" in run(fleet, "outputs", "show", name).stdout
    assert client.get_job(run(fleet, "outputs", "rerun", name).stdout.strip())["job_type"] == "image_gen"
    (tmp_path / "a.txt").write_text("hello")
    assert run(fleet, "input", "upload", str(tmp_path / "a.txt")).stdout.startswith("input:")
    assert "removed" in run(fleet, "outputs", "rm", name).stdout
    assert run(fleet, "outputs", "rm", name, code=4).stdout == ""


def run(fleet: FleetProcess, *words: str, code: int = 0) -> Any:
    done = fleet_command(*words, url=fleet.url)
    assert done.exit_code == code, done.output
    return done


def raw(fleet: FleetProcess, method: str, path: str) -> tuple[int, dict[str, Any]]:
    """A request whose path goes out just as it is."""
    connection = http.client.HTTPConnection("localhost", fleet.port, timeout=60)
    try:
        connection.putrequest(method, path, skip_accept_encoding=True)
        connection.putheader("content-length", "0")
        connection.endheaders()
        reply = connection.getresponse()
        data = reply.read()
        body = json.loads(data) if data.startswith(b"{") else {}
        body.pop("request_id", None)
        return reply.status, body
    finally:
        connection.close()


ATTACKS = {
    "parent": "../outputs/{name}",
    "parent, encoded slash": "..%2foutputs%2f{name}",
    "encoded dots": "%2e%2e/outputs/{name}",
    "encoded dots and slash": "%2e%2e%2foutputs%2f{name}",
    "twice encoded": "%252e%252e%252foutputs%252f{name}",
    "backslash": "..%5coutputs%5c{name}",
    "absolute": "/etc/{name}",
    "absolute, encoded": "%2fetc%2f{name}",
    "here": "./{name}",
    "here, encoded": "%2e%2f{name}",
    "NUL": "{name}%00.png",
    "stream": "{name}::$DATA",
    "space": "{name}%20",
    "hidden": ".{name}",
    "over-long": "{name}" + "x" * 100,
    "far too long": "{name}" + "x" * 5_000,
    "half-width": "%ef%bc%8e%ef%bc%8e%2f{name}",
    "overlong UTF-8": "%c0%ae%c0%ae%2f{name}",
    "prefix": "comfyui%2f{name}",
    "slash after": "{name}/",
}


@pytest.fixture(scope="module")
def existing(fleet: FleetProcess) -> str:
    with FleetCommander(fleet.url) as client:
        name: str = client.generate_image("a target", **SMALL).info["filename"]
        return name


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize(("method", "tail"), [("GET", ""), ("DELETE", ""), ("GET", "/metadata"), ("POST", "/rerun"),
                                              ("PATCH", "")])  # fmt: skip
def test_attacks_are_refused_alike_for_existing_and_missing_files(
    fleet: FleetProcess, existing: str, attack: str, method: str, tail: str
) -> None:
    answers = []
    for name in (existing, "f" * 32 + ".png"):
        status, body = raw(fleet, method, f"/api/vision/outputs/{ATTACKS[attack].format(name=name)}{tail}")
        answers.append((status, body.get("reason"), body.get("detail", "").replace(name, "NAME")))
    assert answers[0] == answers[1]
    assert answers[0][0] in (400, 404, 405), answers
    assert raw(fleet, "GET", f"/api/vision/outputs/{existing}")[0] == 200, "its allowed twin"


def test_names_that_only_look_odd_are_fine(fleet: FleetProcess, client: FleetCommander) -> None:
    """Dots, dashes and a percent-encoded letter are no attack."""
    name = client.generate_image("odd", **SMALL).info["filename"]
    assert raw(fleet, "GET", f"/api/vision/outputs/%{ord(name[0]):02x}{name[1:]}")[0] == 200


def test_links_and_folders_are_not_there(fleet: FleetProcess, existing: str) -> None:
    folder = fleet.folder / "outputs"
    (folder / "link.png").symlink_to(folder / existing)
    (folder / "out.png").symlink_to("/etc/hostname")
    (folder / "sub.png").mkdir()
    for name in ("link.png", "out.png", "sub.png"):
        assert raw(fleet, "GET", f"/api/vision/outputs/{name}")[0] == 404
        assert raw(fleet, "DELETE", f"/api/vision/outputs/{name}")[0] == 404
    assert (folder / existing).exists()
    with FleetCommander(fleet.url) as client:
        listed = {one["filename"] for one in client.list_outputs("local", limit=1000)["outputs"]}
    assert existing in listed and not listed & {"link.png", "out.png", "sub.png"}


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"])
@pytest.mark.parametrize("path", ["/api/outputs/stats", "/api/outputs/list", "/api/vision/gallery"])
def test_wrong_methods_are_told_the_right_one(fleet: FleetProcess, method: str, path: str) -> None:
    reply = httpx.request(method, fleet.url + path, timeout=60)
    assert (reply.status_code, reply.headers["allow"]) == (405, "GET, HEAD")


def test_a_get_never_acts(fleet: FleetProcess, existing: str) -> None:
    for path in ("/api/outputs/sync", "/api/outputs/cleanup", "/api/outputs/move-all-to-s3",
                 f"/api/vision/outputs/{existing}/rerun", "/api/inputs"):  # fmt: skip
        assert raw(fleet, "GET", path)[0] == 405


def test_unknown_parameters_delete_nothing(fleet: FleetProcess) -> None:
    status, body = raw(fleet, "POST", "/api/outputs/cleanup?max_age_hours=0.001&dryrun=true")
    assert (status, body["reason"]) == (400, "UNKNOWN_FIELD")
    for hours in ("0", "-1", "nan", "inf", "87601", "x", ""):
        status, body = raw(fleet, "POST", f"/api/outputs/cleanup?max_age_hours={hours}")
        assert (status, body["detail"].startswith("max_age_hours")) == (400, True)
    assert raw(fleet, "POST", "/api/outputs/cleanup?max_age_hours=87600&dry_run=true")[0] == 200


def test_without_s3_the_calls_say_so(quiet: httpx.Client) -> None:
    for path in ("sync", "cleanup", "move-all-to-s3"):
        reply = quiet.post(f"/api/outputs/{path}")
        assert (reply.status_code, reply.json()["reason"]) == (503, "S3_UNAVAILABLE") and "retry-after" in reply.headers
    assert quiet.get("/api/outputs/list").status_code == 503
    assert quiet.get("/api/outputs/list?source=local").json() == {"outputs": [], "next_page_token": ""}
    assert quiet.get("/api/outputs/stats").json()["s3"] == {"files": 0, "size_bytes": 0}
    body = {"prompt": "a", "init_image": "s3://fleet-outputs/a.png"}
    reply = quiet.post("/api/vision/generate", json=body)
    assert (reply.status_code, reply.json()["reason"]) == (503, "S3_UNAVAILABLE")
