"""An engine of another package: installed, found, used, cancelled, and gone again."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.fleet_process import FleetProcess
from tests.waiting import wait_until_now

PACKAGE = Path(__file__).parents[1] / "example_engine"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the package is installed, as pip does it; built from a copy, since a build leaves files behind."""
    folder = tmp_path_factory.mktemp("site")
    source = shutil.copytree(PACKAGE, folder / "source")
    words = ["-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", str(folder / "site")]
    done = subprocess.run([sys.executable, *words, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "site"


@pytest.fixture(scope="module")
def api(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    known = os.environ.get("PYTHONPATH", "")
    environment = {
        "PYTHONPATH": f"{site}{os.pathsep}{known}" if known else str(site),
        "FLEET_AGENT_OPTIONS": "wordcount_least=2",
    }
    with (
        FleetProcess(tmp_path_factory.mktemp("fleet") / "data", environment=environment) as fleet,
        httpx.Client(base_url=fleet.url, timeout=60, trust_env=False) as api,
    ):
        yield api


def _submit(api: httpx.Client, **payload: Any) -> str:
    reply = api.post("/api/queue/jobs", json={"job_type": "custom", "payload": {"engine": "wordcount", **payload}})
    assert reply.status_code == 200, reply.text
    return str(reply.json()["job_id"])


def _ended(api: httpx.Client, job_id: str) -> dict[str, Any]:
    def look() -> dict[str, Any] | None:
        job: dict[str, Any] = api.get(f"/api/queue/jobs/{job_id}").json()
        return job if job["status"] in ("succeeded", "failed", "cancelled") else None

    return wait_until_now(look)


def test_it_is_an_engine_of_the_node(api: httpx.Client) -> None:
    [node] = api.get("/api/nodes").json()["nodes"]
    [engine] = [one for one in node["engines"] if one["name"] == "wordcount"]
    assert (engine["status"], engine["version"], engine["job_types"]) == ("ready", "0.1.0", ["custom"])


def test_its_jobs_run(api: httpx.Client) -> None:
    job = _ended(api, _submit(api, text="the cat and the dog"))
    assert (job["status"], job["result"]["text"], job["progress"]) == ("succeeded", "the", 100), job
    [output] = job["result"]["outputs"]
    # As its option says: words that come twice.
    assert api.get(output["url"]).text.split() == ["the,2"]


def test_its_errors_are_the_callers(api: httpx.Client) -> None:
    job = _ended(api, _submit(api, text=7))
    assert (job["status"], job["attempt"]) == ("failed", 1)
    assert (job["error"]["reason"], job["error"]["detail"]) == ("INVALID_FIELD", "payload.text: must be a text")


def test_it_is_cancelled_between_two_words(api: httpx.Client) -> None:
    job_id = _submit(api, text="word " * 10_000, pause_seconds=0.05)
    wait_until_now(lambda: api.get(f"/api/queue/jobs/{job_id}").json()["status"] == "running" or None)
    assert api.delete(f"/api/queue/jobs/{job_id}").json()["status"] == "cancelled"
    assert _ended(api, _submit(api, text="next"))["status"] == "succeeded"


def test_an_engine_that_no_node_has(api: httpx.Client) -> None:
    job_id = _submit(api, engine="no-such", text="x")
    job = api.get(f"/api/queue/jobs/{job_id}").json()
    assert (job["status"], job["wait_reason"], job["attempts"]) == ("queued", "NO_NODE", [])
    [verdict] = api.get(f"/api/queue/jobs/{job_id}/explain").json()["nodes"]
    assert (verdict["reason"], verdict["detail"]) == ("CAPABILITY_MISSING", "it has no ready engine no-such")
    api.delete(f"/api/queue/jobs/{job_id}")
