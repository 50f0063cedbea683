"""Callbacks of a whole fleet: the documented call, the log, once more, and a server killed between commit and send."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fleet_client import FleetCommander
from fleet_client.errors import ApiError

from fleet_server.settings import Settings
from tests import documented
from tests.e2e.commands import fleet_command
from tests.e2e.fleet_process import FleetProcess, clean_environment
from tests.e2e.receiver import Hooks, hooks
from tests.e2e.test_crashes import until
from tests.ports import free_ports

QUICK = {
    "FLEET_WEBHOOK_TIMEOUT_SECONDS": "1",
    "FLEET_WEBHOOK_LEASE_SECONDS": "2",
    "FLEET_WEBHOOK_SCHEDULE_SECONDS": "0.2 0.2 0.2 0.2 0.2 0.2 0.2 0.2 0.2 0.2",
}
SMALL = {"job_type": "image_gen", "payload": {"prompt": "a sea", "width": 64, "height": 64, "steps": 1}}


@pytest.fixture
def receiver() -> Iterator[Hooks]:
    with hooks() as opened:
        yield opened


@pytest.fixture
def own(tmp_path: Path) -> Iterator[FleetProcess]:
    """A fleet that may be killed."""
    with tempfile.TemporaryDirectory(prefix="fleet-") as folder:
        process = FleetProcess(Path(folder) / "data", environment=QUICK)
        with process:
            yield process


def secret_of(fleet: FleetProcess) -> str:
    return (fleet.folder / "webhook-secret").read_text().strip()


def test_the_documented_call_gets_a_signed_post(fleet: FleetProcess, receiver: Hooks, tmp_path: Path) -> None:
    here = {"https://your-app.com/webhook": receiver.url}
    job_id = documented.reply(documented.QUEUE_JOB, fleet.url, tmp_path, here)["job_id"]
    until(lambda: receiver.came, "the callback")
    told = receiver.told(0, secret_of(fleet))
    with FleetCommander(fleet.url) as client:
        job = client.get_job(job_id)
        assert told == {"type": "job.complete", "timestamp": job["end_time"], "data": told["data"]}
        assert told["data"]["status"] == "succeeded"
        assert told["data"]["result"]["outputs"][0]["filename"] == job["result"]["outputs"][0]["filename"]
        (delivery,) = until(
            lambda: [one for one in client.list_deliveries(job_id)["deliveries"] if one["status"] == "delivered"],
            "the log of the callback",
        )
    assert (delivery["webhook_id"], delivery["attempts"][0]["status_code"]) == (f"{job_id}.1", 200)
    counted = 'fleet_webhook_tries_total{state="delivered"}'
    until(lambda: counted in httpx.get(f"{fleet.url}/metrics", timeout=60).text, "the count of tries")
    shown = fleet_command("jobs", "deliveries", job_id, url=fleet.url)
    assert shown.exit_code == 0 and "delivered" in shown.stdout and delivery["delivery_id"] in shown.stdout
    again = fleet_command("jobs", "redeliver", job_id, delivery["delivery_id"], url=fleet.url)
    assert again.exit_code == 0 and "pending" in again.stdout
    until(lambda: len(receiver.came) == 2, "the callback once more")
    assert receiver.ids == [f"{job_id}.1"] * 2
    assert receiver.told(1, secret_of(fleet)) == told


def test_the_secret_is_its_owners_alone_and_in_no_log(fleet: FleetProcess) -> None:
    path = fleet.folder / "webhook-secret"
    assert path.stat().st_mode & 0o777 == 0o600
    log = fleet.log.read_text()
    assert str(path) in log
    assert secret_of(fleet).removeprefix("whsec_") not in log


def test_our_own_doors_are_no_receivers(fleet: FleetProcess) -> None:
    with FleetCommander(fleet.url) as client:
        for port in (fleet.port, fleet.grpc_port):
            for host in ("localhost", "127.0.0.1", "[::1]"):
                with pytest.raises(ApiError) as caught:
                    client.submit_job({**SMALL, "callback_url": f"http://{host}:{port}/health"})
                assert caught.value.reason == "CALLBACK_FORBIDDEN"


def test_a_server_killed_between_commit_and_answer_sends_again_after_its_restart(
    own: FleetProcess, receiver: Hooks
) -> None:
    receiver.silent.set()
    with FleetCommander(own.url) as client:
        job_id = client.submit_job({**SMALL, "callback_url": receiver.url})["job_id"]
    until(lambda: receiver.came, "the first request")
    own.kill()
    before = len(receiver.came)
    receiver.silent.clear()
    secret = secret_of(own)
    own.start()
    until(lambda: len(receiver.came) > before, "the callback after the restart")
    assert set(receiver.ids) == {f"{job_id}.1"}
    assert receiver.told(before, secret)["data"]["job_id"] == job_id
    with FleetCommander(own.url) as client:
        until(lambda: client.list_deliveries(job_id)["deliveries"][0]["status"] == "delivered", "its end in the log")


def test_a_receiver_that_hangs_holds_up_neither_jobs_nor_the_stop(own: FleetProcess, receiver: Hooks) -> None:
    receiver.silent.set()
    with FleetCommander(own.url) as client:
        client.submit_job({**SMALL, "callback_url": receiver.url})
        until(lambda: receiver.came, "the request that is never answered")
        other = client.submit_job(SMALL)["job_id"]
        assert client.wait(other)["status"] == "succeeded"
    assert own.stop() == 0


def test_the_receiver_of_the_documentation_works_as_it_stands(fleet: FleetProcess) -> None:
    text = (Path(__file__).parents[2] / "docs" / "webhooks.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (port,) = free_ports(1)
    environment = clean_environment({"WEBHOOK_SECRET": secret_of(fleet), "PORT": str(port)})
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        text=True,
    )
    try:
        assert process.stdout is not None
        url = f"http://127.0.0.1:{port}/webhook"
        forged = {"webhook-id": "x.1", "webhook-timestamp": str(int(time.time())), "webhook-signature": "v1,AAAA"}
        answer = until(lambda: httpx.post(url, headers=forged, content=b"{}", timeout=60), "the receiver")
        assert answer.status_code == 401
        with FleetCommander(fleet.url) as client:
            job_id = client.submit_job({**SMALL, "callback_url": url})["job_id"]
            words = process.stdout.readline().split()
            (output,) = client.get_job(job_id)["result"]["outputs"]
        assert words == [job_id, "succeeded", output["filename"]]
    finally:
        process.kill()
        process.communicate()


def test_the_documented_settings_are_the_settings() -> None:
    text = (Path(__file__).parents[2] / "docs" / "webhooks.md").read_text()
    named = dict(re.findall(r"^\| `(FLEET_[A-Z_]+)` \| ([0-9 ]+) \|", text, re.MULTILINE))
    settings = {
        f"FLEET_{name.upper()}": field.default
        for name, field in Settings.model_fields.items()
        if name.startswith("webhook_") and "secret" not in name
    }
    assert set(named) == set(settings)
    for name, default in settings.items():
        values = default if isinstance(default, tuple) else (default,)
        assert [float(word) for word in named[name].split()] == list(values), name
