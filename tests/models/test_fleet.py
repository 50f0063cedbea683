"""Models from a bucket to three agents on one machine, with real servers all the way."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from fleet_client import FleetCommander
from fleet_client.errors import ApiError
from minio import Minio

from fleet_agent.engines.sketch_model import make_checkpoint, make_lora
from tests.e2e.commands import fleet_command
from tests.e2e.fleet_process import FleetProcess
from tests.models.tap import Tap
from tests.s3.embedded import ACCESS, SECRET, EmbeddedProcess
from tests.waiting import wait_until_now

SIZE = 24_000_000
LIMIT = 64 << 20
"""What server and agents may grow by, at most."""
PICTURE: dict[str, Any] = {"width": 64, "height": 64, "steps": 1}


@dataclass
class Place:
    """The parts. The agent beside the server is `home`."""

    folder: Path
    tap: Tap
    fleet: FleetProcess
    client: FleetCommander
    agents: dict[str, FleetProcess]
    files: Path
    home: str

    def put(self, bucket: str, name: str, data: bytes) -> None:
        client = Minio(f"127.0.0.1:{self.tap.port}", ACCESS, SECRET, secure=False)
        client.put_object(bucket, name, io.BytesIO(data), len(data))

    def model(self, name: str, size: int, seed: int = 0) -> bytes:
        """A checkpoint for sketch in the bucket; its bytes."""
        data = make_checkpoint(self.files / name, "noir", seed, size).read_bytes()
        self.put("fleet-models", name, data)
        wait_until_now(lambda: name in self.names)
        return data

    @property
    def names(self) -> set[str]:
        """Of the models that the fleet knows."""
        return {one["name"] for one in self.client.list_models()["models"]}

    def folder_of(self, node_id: str) -> Path:
        return self.folder / ("data/agent" if node_id == self.home else node_id) / "models"

    def have(self, name: str) -> list[str]:
        found = [one["node_ids"] for one in self.client.list_models()["models"] if one["name"] == name]
        return found[0] if found else []

    def download(self, name: str, *node_ids: str) -> dict[str, str]:
        reply = self.client.download_model(name, node_ids)
        return {one["node_id"]: one["status"] for one in reply["downloads"]}

    def agent(self, node_id: str, **more: str) -> FleetProcess:
        """An agent process of its own, started."""
        agent = FleetProcess(
            self.folder / node_id,
            command=(
                *("agent", "--server", f"127.0.0.1:{self.fleet.grpc_port}"),
                *("--node-id", node_id, "--engines", "sketch"),
            ),
            environment={"FLEET_AGENT_DOWNLOAD_SYNC_BYTES": str(1 << 20), **more},
        )
        # What an earlier one of that name said is over.
        wait_until_now(lambda: node_id not in self.online)
        agent.spawn()
        self.agents[node_id] = agent
        wait_until_now(lambda: node_id in self.online)
        return agent

    @property
    def online(self) -> set[str]:
        """The nodes that are."""
        return {node["node_id"] for node in self.client.list_nodes()["nodes"] if node["status"] == "online"}


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fleet-")))
        s3 = stack.enter_context(EmbeddedProcess(folder / "s3"))
        tap = stack.enter_context(Tap(s3.port))
        fleet = stack.enter_context(
            FleetProcess(
                folder / "data",
                environment={
                    "FLEET_S3_ENDPOINT": f"http://127.0.0.1:{tap.port}",
                    "FLEET_S3_ACCESS_KEY": ACCESS,
                    "FLEET_S3_SECRET_KEY": SECRET,
                    "FLEET_MODELS_REFRESH_SECONDS": "0.3",
                    "FLEET_ENGINES": "sketch",
                },
            )
        )
        client = stack.enter_context(FleetCommander(fleet.url))
        files = folder / "files"
        files.mkdir()
        (home,) = client.list_nodes()["nodes"]
        made = Place(folder, tap, fleet, client, {}, files, home["node_id"])
        stack.callback(lambda: [agent.stop() for agent in made.agents.values()])
        for node_id in ("a1", "a2"):
            made.agent(node_id)
        yield made


def rss(process: int) -> int:
    return int(psutil.Process(process).memory_info().rss)


def processes(place: Place) -> dict[str, int]:
    """The server and the three agents."""
    (home,) = place.fleet.pids("fleet_agent")
    return {"server": place.fleet.pid, "home": home, **{name: agent.pid for name, agent in place.agents.items()}}


def test_a_model_reaches_three_agents_by_one_read_each(place: Place) -> None:
    data = place.model("big.safetensors", SIZE)
    nodes = [place.home, "a1", "a2"]
    before = {name: rss(pid) for name, pid in processes(place).items()}
    assert place.download("big.safetensors", *nodes) == dict.fromkeys(nodes, "downloaded")
    grown = {name: rss(pid) - before[name] for name, pid in processes(place).items()}
    assert max(grown.values()) < LIMIT, grown
    assert place.tap.reads["/fleet-models/big.safetensors"] <= 3
    for node_id in nodes:
        assert (place.folder_of(node_id) / "checkpoints" / "big.safetensors").read_bytes() == data
    assert place.download("big.safetensors", *nodes) == dict.fromkeys(nodes, "present")
    assert place.tap.reads["/fleet-models/big.safetensors"] <= 3
    wait_until_now(lambda: len(place.have("big.safetensors")) == len(nodes))
    (model,) = [one for one in place.client.list_models()["models"] if one["name"] == "big.safetensors"]
    assert (model["in_s3"], model["node_ids"], model["sha256"]) == (
        True,
        sorted(nodes),
        hashlib.sha256(data).hexdigest(),
    )
    assert (model["size_bytes"], model["architecture"], model["format"]) == (len(data), "sketch", "safetensors")


def test_a_cut_at_half_of_it_resumes(place: Place) -> None:
    data = place.model("cut.safetensors", SIZE, seed=1)
    place.tap.offsets.clear()
    place.tap.cut_after = SIZE // 2
    assert place.download("cut.safetensors", "a1") == {"a1": "downloaded"}
    assert (place.folder_of("a1") / "checkpoints" / "cut.safetensors").read_bytes() == data
    first, second = place.tap.offsets
    assert first == 0 and second >= SIZE // 4, "it went on where it was"


def test_an_agent_that_is_killed_in_the_middle_leaves_no_half_file(place: Place) -> None:
    data = place.model("killed.safetensors", SIZE, seed=2)
    target = place.folder_of("a2") / "checkpoints" / "killed.safetensors"
    place.tap.offsets.clear()
    place.tap.hold_after = SIZE // 2
    pictures = place.client.queue_job("a hill", model="killed.safetensors", target_node_id="a2", **PICTURE)
    partials = place.folder_of("a2") / ".partial"
    wait_until_now(lambda: any(path.stat().st_size > SIZE // 3 for path in partials.glob("*.part")))
    os.kill(place.agents["a2"].pid, signal.SIGKILL)
    place.agents["a2"].kill()
    assert not target.exists()
    place.tap.hold_after = None
    place.agent("a2")
    # The job still waits: its model is brought now, from where it was.
    assert place.client.wait(pictures["job_id"], timeout_seconds=150)["node_id"] == "a2"
    assert target.read_bytes() == data
    assert place.tap.offsets[0] == 0 and max(place.tap.offsets) >= SIZE // 4


def test_jobs_for_what_the_buckets_alone_have_run(place: Place) -> None:
    place.model("new.safetensors", 300_000, seed=3)
    place.put("fleet-loras", "ink.safetensors", make_lora(place.files / "ink.safetensors", "ink").read_bytes())
    wait_until_now(lambda: [one for one in place.client.list_loras()["loras"] if one["name"] == "ink.safetensors"])
    payload = {"prompt": "a hill", "model": "new.safetensors", "loras": [{"name": "ink.safetensors"}], **PICTURE}
    asked = place.client.dry_run_job({"job_type": "image_gen", "payload": payload})
    assert "from S3" in asked["summary"] and all("S3 first" in node["detail"] for node in asked["nodes"])
    reads = place.tap.reads["/fleet-models/new.safetensors"]
    receipts = [place.client.submit_job({"job_type": "image_gen", "payload": payload}) for _ in range(4)]
    assert {receipt["wait_reason"] for receipt in receipts} == {None}
    jobs = [place.client.wait(receipt["job_id"], timeout_seconds=150) for receipt in receipts]
    assert {job["status"] for job in jobs} == {"succeeded"}

    def lora() -> dict[str, Any]:
        found: list[dict[str, Any]] = place.client.list_loras()["loras"]
        return next(one for one in found if one["name"] == "ink.safetensors")

    # Heartbeats say who has what.
    wait_until_now(lambda: lora()["node_ids"] and place.have("new.safetensors"))
    assert lora()["in_s3"] and lora()["trigger_words"] and len(lora()["node_ids"]) == 1
    assert len(place.have("new.safetensors")) == 1, "one node has it, and that is enough"
    assert place.tap.reads["/fleet-models/new.safetensors"] - reads <= 1
    # The direct road waits for a download as well.
    place.model("direct.safetensors", 300_000, seed=4)
    assert place.client.generate_image("a hill", model="direct.safetensors", **PICTURE).size == (64, 64)


def test_what_cannot_be_brought_is_explained(place: Place) -> None:
    place.agent("small", FLEET_AGENT_MODELS_BUDGET_BYTES="1000000", FLEET_AGENT_LABELS="tier=small")
    try:
        place.model("large.safetensors", 5_000_000, seed=5)
        job = place.client.submit_job(
            {
                "job_type": "image_gen",
                "payload": {"prompt": "x", "model": "large.safetensors"},
                "target_labels": {"tier": "small"},
            }
        )
        assert job["wait_reason"] == "NO_NODE"
        verdicts = {node["node_id"]: node for node in place.client.explain_job(job["job_id"])["nodes"]}
        assert verdicts["small"]["reason"] == "MODEL_MISSING" and "budget of 1,000,000" in verdicts["small"]["detail"]
        place.client.cancel_job(job["job_id"])
        reply = place.client.download_model("large.safetensors", ["small"])["downloads"][0]
        assert reply["status"] == "failed" and "DISK_FULL" in reply["detail"]
        # Two that fit one by one: the older makes room.
        for number in (6, 7):
            place.model(f"fits{number}.safetensors", 600_000, seed=number)
            assert place.download(f"fits{number}.safetensors", "small") == {"small": "downloaded"}
        assert [path.name for path in (place.folder_of("small") / "checkpoints").glob("*.safetensors")] == [
            "fits7.safetensors"
        ]
        wait_until_now(lambda: place.have("fits6.safetensors") == [])
        # What is pinned stays.
        place.client.load_model("small", "fits7.safetensors", pin=True)
        reply = place.client.download_model("fits6.safetensors", ["small"])["downloads"][0]
        assert reply["status"] == "failed" and "pinned" in reply["detail"]
    finally:
        place.agents.pop("small").stop()


def loaded(place: Place, node_id: str) -> dict[str, dict[str, Any]]:
    models = place.client.list_loaded_models()["models"]
    return {model["name"]: model for model in models if model["node_id"] == node_id}


def test_load_pin_and_unload_on_a_node(place: Place) -> None:
    place.model("pinned.safetensors", 400_000, seed=8)
    one = place.client.load_model("a1", "pinned.safetensors", pin=True, request_id="pin-1")
    assert (one["node_id"], one["name"], one["pinned"], one["engine"]) == ("a1", "pinned.safetensors", True, "sketch")
    assert one["memory_bytes"] > 300_000 and one["load_time"] is not None
    assert place.client.load_model("a1", "pinned.safetensors", pin=True, request_id="pin-1") == one
    wait_until_now(lambda: loaded(place, "a1").get("pinned.safetensors", {}).get("pinned"))
    job = place.client.queue_job("a hill", target_node_id="a1", model="sketch", **PICTURE)
    place.client.wait(job["job_id"], timeout_seconds=150)
    wait_until_now(lambda: "sketch" in loaded(place, "a1"))
    assert loaded(place, "a1")["pinned.safetensors"]["pinned"], "another model does not put it out of memory"
    place.agents["a1"].kill()
    place.agent("a1")
    wait_until_now(lambda: loaded(place, "a1").get("pinned.safetensors", {}).get("pinned"))
    assert place.client.load_model("a1", "pinned.safetensors", pin=False)["pinned"] is False
    assert place.client.unload_model("a1", "pinned.safetensors")["name"] == "pinned.safetensors"
    wait_until_now(lambda: "pinned.safetensors" not in loaded(place, "a1"))
    # By an alias as well.
    alias = place.client.load_model("a1", "SDXL_4GB_FP8.safetensors")
    assert (alias["name"], alias["alias_of"]) == ("SDXL_4GB_FP8.safetensors", "sketch")


@pytest.mark.parametrize(
    ("call", "status", "reason"),
    [
        (lambda c: c.load_model("nope", "sketch"), 404, "NODE_NOT_FOUND"),
        (lambda c: c.load_model("a1", "nope.safetensors"), 404, "MODEL_NOT_FOUND"),
        (lambda c: c.unload_model("a1", "nope.safetensors"), 404, "MODEL_NOT_FOUND"),
        (lambda c: c.download_model("nope.safetensors", ["a1"]), 404, "MODEL_NOT_FOUND"),
        (lambda c: c.download_model("big.safetensors", ["a1", "nope"]), 404, "NODE_NOT_FOUND"),
        (lambda c: c.download_model("big.safetensors", []), 400, "INVALID_FIELD"),
        (lambda c: c.load_model("away", "sketch"), 503, "NODE_OFFLINE"),
    ],
)
def test_refusals(place: Place, call: Any, status: int, reason: str) -> None:
    if reason == "NODE_OFFLINE":
        place.agent("away")
        place.agents.pop("away").stop()
        wait_until_now(lambda: place.client.get_node("away")["status"] != "online")
    with pytest.raises(ApiError) as refused:
        call(place.client)
    assert (refused.value.status, refused.value.reason) == (status, reason)


def test_the_command_line(place: Place) -> None:
    url = place.fleet.url
    place.model("words.safetensors", 300_000, seed=9)
    assert "downloaded" in fleet_command("models", "download", "words.safetensors", "a1", url=url).stdout
    # Heartbeats say who has what.
    wait_until_now(lambda: re.search("words.safetensors .*S3, a1", fleet_command("models", url=url).stdout))
    assert fleet_command("models", "pin", "a1", "words.safetensors", url=url).exit_code == 0
    wait_until_now(lambda: "pinned" in fleet_command("models", "loaded", url=url).stdout)
    assert fleet_command("models", "unload", "a1", "words.safetensors", url=url).exit_code == 0
    assert "ink" in fleet_command("loras", url=url).stdout
    assert fleet_command("models", "load", "a1", "none", url=url).exit_code == 4
