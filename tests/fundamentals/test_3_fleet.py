"""The machines, what they have, what happens on them, and what the server says to a mistake."""

from __future__ import annotations

import pytest
from fleet_client import ApiError, AsyncFleetCommander, FleetCommander


def test_nodes(fleet: FleetCommander) -> None:
    """Each machine that runs an agent is a node: what it can do, what it does, how it is."""
    node = fleet.list_nodes()["nodes"][0]
    assert node["status"] == "online"
    assert "image_gen" in node["job_types"]
    assert fleet.get_node(node["node_id"])["slots"] >= 1
    assert fleet.list_heartbeats()["heartbeats"][0]["host"]["cpu_count"] >= 1


def test_models(fleet: FleetCommander) -> None:
    """Models are what the nodes report; a name may be an alias of what is there, and every reply says so."""
    models = {model["name"]: model for model in fleet.list_models()["models"]}
    assert models["sketch"]["alias_of"] is None
    assert models["SDXL_4GB_FP8.safetensors"]["alias_of"] == "sketch"
    picture = fleet.generate_image("a hill", model="SDXL_4GB_FP8.safetensors", width=64, height=64)
    assert picture.info["resolved_model"] == "sketch"


def test_events_since(fleet: FleetCommander) -> None:
    """What happened has an id; a listener that comes back goes on after the last one it saw and misses nothing."""
    job_id = fleet.queue_job("seen from start to end", width=64, height=64)["job_id"]
    fleet.wait(job_id)
    seen = []
    for event in fleet.watch_events(since="0", job_id=job_id):
        seen.append(event)
        if event["type"] == "job_complete":
            break
    for event in fleet.watch_events(since=seen[0]["id"], job_id=job_id):
        assert event == seen[1]
        break


def test_errors_name_the_field(fleet: FleetCommander) -> None:
    """A refusal says which field is wrong and what it must be; `reason` is the stable word for programs."""
    with pytest.raises(ApiError) as refused:
        fleet.generate_image("a sunset", width=1001)
    assert (refused.value.status, refused.value.reason) == (400, "INVALID_FIELD")
    assert refused.value.violations[0].field == "width"
    assert str(refused.value).startswith("width: must be a multiple of 8")


def test_the_status(fleet: FleetCommander) -> None:
    """One call says how all of it is."""
    status = fleet.status()
    assert status["status"] == "ok"
    assert status["nodes"]["online"] == 1
    assert status["durability"] == "fsync"


async def test_the_same_with_asyncio(address: str) -> None:
    """`AsyncFleetCommander` has the same methods, to be awaited."""
    async with AsyncFleetCommander(address) as fleet:
        receipt = await fleet.queue_job("a sunset", width=64, height=64)
        async for event in fleet.watch_job(receipt["job_id"]):
            kind = event["type"]
        assert kind == "job_complete"
        assert (await fleet.generate_image("a night", width=64, height=64)).size == (64, 64)
