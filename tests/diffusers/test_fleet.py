"""The tiny SDXL through a whole fleet: `fleet up` with the engine `diffusers`, four jobs at a time in one batch."""

from __future__ import annotations

import base64
import io
import os
import signal
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest
from fleet_client import FleetCommander, JobFailedError
from PIL import Image

from tests.diffusers import micro
from tests.e2e.fleet_process import FleetProcess, slowed
from tests.e2e.held_upload import RETRY, end_in_upload, kept
from tests.e2e.in_s3 import keys_in_s3
from tests.waiting import wait_until_now

# What diffusers and torch do with each other and with NumPy is theirs.
pytestmark = [
    *(pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "FutureWarning")),
    pytest.mark.timeout(300),
]
PATIENCE = 150.0
"""Each new process imports torch, which takes 4 s of CPU: on a machine with other work, much longer."""

Pixels = npt.NDArray[np.int16]
SMALL: dict[str, Any] = {"prompt": "a red boat", "width": 64, "height": 64, "steps": 3, "seed": 7}
LONG: dict[str, Any] = {**SMALL, "width": 256, "height": 256, "steps": 150}
ENDED = ("succeeded", "failed", "cancelled")


@pytest.fixture(scope="module")
def fleet(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FleetProcess]:
    environment = {
        "FLEET_ENGINES": "diffusers",
        "FLEET_AGENT_MODELS_DIR": str(models),
        # Long enough that a busy machine makes no other batches; a full one does not wait.
        "FLEET_AGENT_BATCH_WAIT_SECONDS": "0.5",
        "FLEET_DEFAULT_MODEL": micro.MODEL,
        "FLEET_S3_PORT": "0",
        # Outputs are files of their own, as large ones are.
        **RETRY,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    folder = tmp_path_factory.mktemp("fleet") / "data"
    with FleetProcess(folder, "--agent-batch", "4", environment=environment) as fleet:
        yield fleet


@pytest.fixture
def client(fleet: FleetProcess) -> Iterator[FleetCommander]:
    with FleetCommander(fleet.url) as client:
        yield client


@pytest.fixture
def api(fleet: FleetProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=fleet.url, timeout=60, trust_env=False) as api:
        yield api


def submit(client: FleetCommander, **fields: Any) -> str:
    payload = {"model": micro.MODEL, **SMALL, **fields}
    return str(client.submit_job({"job_type": "image_gen", "payload": payload, "max_retries": 3})["job_id"])


def ended(client: FleetCommander, job_id: str) -> dict[str, Any]:
    """The job as it is when it has ended."""

    def look() -> dict[str, Any] | None:
        job = client.get_job(job_id)
        return job if job["status"] in ENDED else None

    job = wait_until_now(look, seconds=PATIENCE)
    assert job["status"] == "succeeded", job["error"]
    return job


def picture(client: FleetCommander, output: dict[str, Any]) -> Pixels:
    with Image.open(io.BytesIO(client.get_output(output["filename"]))) as image:
        return np.asarray(image).astype(np.int16)


def paint(client: FleetCommander, **fields: Any) -> Pixels:
    [output] = ended(client, submit(client, **fields))["result"]["outputs"]
    return picture(client, output)


def apart(left: Pixels, right: Pixels) -> int:
    return int(np.abs(left - right).max())


def another_slot(fleet: FleetProcess, unlike: int) -> int:
    """The slot's process that took the place of that one."""
    return wait_until_now(lambda: slot if (slot := fleet.slot()) != unlike else None, seconds=PATIENCE)


def step_of(client: FleetCommander, job_id: str) -> int:
    return int(client.get_job(job_id)["step"] or 0)


def all_seats_free(client: FleetCommander) -> bool:
    [node] = client.list_nodes()["nodes"]
    return bool(node["slots_free"] == node["slots"] == 4)


def in_memory(client: FleetCommander, loras: list[str]) -> dict[str, Any] | None:
    """The folder's model, where it is loaded with just these LoRAs."""
    models: list[dict[str, Any]] = client.list_loaded_models()["models"]
    return next((one for one in models if one["name"] == micro.MODEL and one["loras"] == loras), None)


def test_what_there_is(client: FleetCommander) -> None:
    [node] = client.list_nodes()["nodes"]
    [engine] = node["engines"]
    assert (engine["name"], engine["status"], engine["job_types"]) == ("diffusers", "ready", ["image_gen"])
    models = {model["name"]: model for model in client.list_models()["models"]}
    assert set(models) == {micro.MODEL, micro.ONE_FILE}
    assert {model["architecture"] for model in models.values()} == {"sdxl"}
    [lora] = client.list_loras()["loras"]
    assert (lora["name"], lora["trigger_words"]) == (micro.LORA, ["ink"])


def test_progress_and_previews_come_while_it_is_made(client: FleetCommander) -> None:
    job_id = submit(client, **{**LONG, "steps": 30})
    with closing(client.watch_job(job_id, previews=True)) as events:
        ticks = [event["data"] for event in events if event["type"] == "job_progress"]
    # A preview names the step that it shows, which may be over.
    steps = [tick["step"] for tick in ticks if not tick["preview"]]
    # On a busy machine a later one takes the place of one that waits.
    assert steps == sorted(steps) and len(set(steps)) >= 3
    assert {tick["steps"] for tick in ticks} == {30}
    shown = [tick["preview"] for tick in ticks if tick["preview"]]
    assert {one["content_type"] for one in shown} == {"image/jpeg"}
    with Image.open(io.BytesIO(base64.b64decode(shown[-1]["data"]))) as image:
        assert max(image.size) >= 64
    assert ended(client, job_id)["progress"] == 100


def test_its_settings_are_in_the_file_and_in_the_lists(client: FleetCommander, api: httpx.Client) -> None:
    job = ended(client, submit(client, scheduler="ddim", guidance_scale=3.0))
    [output] = job["result"]["outputs"]
    assert (output["width"], output["height"], output["seed"]) == (64, 64, 7)
    about = client.get_output_metadata(output["filename"])["metadata"]
    assert len(keys_in_s3(api, [output])) == 1
    assert (about["model"], about["prompt"], about["engine"]) == (micro.MODEL, "a red boat", "diffusers")
    with Image.open(io.BytesIO(client.get_output(output["filename"]))) as image:
        texts = image.info
    assert (texts["model"], texts["seed"], texts["scheduler"], texts["steps"]) == (micro.MODEL, "7", "ddim", "3")
    assert "CFG scale: 3" in texts["parameters"]


def test_a_lora_is_put_on_and_taken_off_exactly(client: FleetCommander) -> None:
    without = paint(client)
    with_lora = paint(client, loras=[{"name": micro.LORA, "weight": 1.0}])
    # A heartbeat says what is in memory.
    loaded = wait_until_now(lambda: in_memory(client, [micro.LORA]))
    assert loaded["memory_bytes"] > 1_000_000
    assert apart(without, with_lora) > 8
    assert apart(without, paint(client)) == 0
    wait_until_now(lambda: in_memory(client, []))


def test_one_file_is_the_same_model(client: FleetCommander) -> None:
    """But for float16, in which the file is. Both stay in memory."""
    assert apart(paint(client), paint(client, model=micro.ONE_FILE)) <= 4
    both = {micro.MODEL, micro.ONE_FILE}
    wait_until_now(lambda: {one["name"] for one in client.list_loaded_models()["models"]} == both)


def test_four_images_of_one_request_are_one_batch(client: FleetCommander) -> None:
    """Each is what it is alone, within 2 of 255 a channel."""
    group = ended(client, submit(client, n=4, seed=100))
    children = [client.get_job(job_id) for job_id in group["child_job_ids"]]
    assert len(children) == 4
    # They are begun and ended by one thread: had each run alone, one would have ended before the next began.
    moments = [[datetime.fromisoformat(child[name]) for child in children] for name in ("start_time", "end_time")]
    assert max(moments[0]) < min(moments[1])
    together = [picture(client, output) for output in group["result"]["outputs"]]
    alone = [paint(client, seed=seed) for seed in range(100, 104)]
    for index in range(4):
        assert apart(together[index], alone[index]) <= 2
        assert all(apart(together[index], alone[other]) > 8 for other in range(4) if other != index)


def test_one_of_a_batch_is_cancelled_mid_run(client: FleetCommander, fleet: FleetProcess) -> None:
    """It ends at once, the other as it would; the process goes on, with its models in memory."""
    slot = fleet.slot()
    payloads = [{**LONG, "model": micro.MODEL, "seed": seed, "steps": 40} for seed in (1, 2)]
    with slowed(slot):
        # In one call, and so in one batch.
        receipts = client.submit_batch([{"job_type": "image_gen", "payload": payload} for payload in payloads])
        one, other = (receipt["job_id"] for receipt in receipts)
        wait_until_now(lambda: min(step_of(client, one), step_of(client, other)) >= 2, seconds=PATIENCE)
        assert client.cancel_job(one)["status"] == "cancelled"
        # A seat is free while the other is at work: the slot has heard, within a step.
        wait_until_now(lambda: client.list_nodes()["nodes"][0]["slots_free"] == 3, seconds=PATIENCE)
        assert client.get_job(other)["status"] == "running"
    with pytest.raises(JobFailedError):
        client.wait(one)
    ended(client, other)
    wait_until_now(lambda: all_seats_free(client))
    assert fleet.slot() == slot
    wait_until_now(lambda: not kept(fleet), seconds=PATIENCE)


def test_killed_mid_run_and_before_the_first_step(client: FleetCommander, fleet: FleetProcess) -> None:
    """The job is tried again and says why; one that is cancelled meanwhile leaves nothing. The agent lives."""
    agent, slot = fleet.pids("fleet_agent")[0], fleet.slot()
    with slowed(slot):
        job_id = submit(client, **{**LONG, "steps": 20})
        wait_until_now(lambda: step_of(client, job_id) >= 2, seconds=PATIENCE)
    os.kill(slot, signal.SIGKILL)
    # The next process imports for seconds before it has the model.
    again = another_slot(fleet, slot)
    wait_until_now(lambda: running(client, job_id, attempt=2), seconds=PATIENCE)
    # Alike, and there before the next process is, so that it is begun with the other.
    other = submit(client, **{**LONG, "steps": 20, "seed": 9})
    os.kill(again, signal.SIGKILL)
    # If it had not begun with the job yet, the same attempt goes on with the next.
    with slowed(another_slot(fleet, again)):
        wait_until_now(
            lambda: running(client, job_id, attempt=2) and running(client, other, attempt=1), seconds=PATIENCE
        )
        assert not step_of(client, other)
        assert client.cancel_job(other)["status"] == "cancelled"
    job = ended(client, job_id)
    failed = [attempt["error"] for attempt in job["attempts"] if attempt["error"]]
    assert {error["reason"] for error in failed} == {"ENGINE_FAILED"}
    assert len(failed) in (1, 2) and all("signal 9" in error["detail"] for error in failed)
    wait_until_now(lambda: all_seats_free(client))
    wait_until_now(lambda: not kept(fleet), seconds=PATIENCE)
    assert fleet.pids("fleet_agent")[0] == agent


def running(client: FleetCommander, job_id: str, attempt: int) -> bool:
    job = client.get_job(job_id)
    return bool(job["status"] == "running" and job["attempt"] >= attempt)


def test_cancelled_and_killed_while_its_picture_goes_to_the_server(
    client: FleetCommander, api: httpx.Client, fleet: FleetProcess
) -> None:
    """The last of all: the slot that is killed here is not needed again, and the next one would import for seconds."""
    for how in ("cancelled", "killed"):
        end_in_upload(fleet, api, lambda: submit(client), "image/png", how)
    wait_until_now(lambda: all_seats_free(client), seconds=PATIENCE)
