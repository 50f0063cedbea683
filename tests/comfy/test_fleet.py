"""Three nodes with different models and custom nodes: prompts land where they can run; a lost node loses none.

`make soak` runs it with the lease of production, else that is shortened.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.comfy.client import Listener
from tests.comfy.house import House, house_in, progress
from tests.comfy_node import STANDARD, Script, node_class

Json = Any
LONG = ["INT", {"default": 0, "min": -(2**64) + 1, "max": 2**64 - 1}]
"""As nodes of ComfyUI have it: no float holds that."""
ENHANCE = node_class(
    "FleetEnhance", {"image": ["IMAGE"]}, {"seed": LONG}, output=["IMAGE"], module="custom_nodes.fleet_enhance"
)
FULL = os.environ.get("FLEET_COMFY_LEASE") == "full"
LEASE = (
    {"FLEET_LEASE_SECONDS": "30", "FLEET_HEARTBEAT_SECONDS": "5"}
    if FULL
    else {"FLEET_LEASE_SECONDS": "5", "FLEET_HEARTBEAT_SECONDS": "0.4"}
)


def script(*, checkpoints: tuple[str, ...], enhances: bool) -> Script:
    classes = {**STANDARD, "FleetEnhance": ENHANCE} if enhances else dict(STANDARD)
    return Script(checkpoints=checkpoints, node_classes=classes, step_seconds=0.03)


@pytest.fixture(scope="module")
def three() -> Iterator[House]:
    """red: base alone; green: base and photo, and the custom node; blue: photo, and the custom node."""
    with tempfile.TemporaryDirectory(prefix="fleet-") as folder, house_in(Path(folder), LEASE) as house:
        house.join("red", script(checkpoints=("base.safetensors",), enhances=False), **LEASE)
        house.join("green", script(checkpoints=("base.safetensors", "photo.safetensors"), enhances=True), **LEASE)
        house.join("blue", script(checkpoints=("photo.safetensors",), enhances=True), **LEASE)
        house.settled()
        house.until(lambda: len(lists(house)) == 2 and "FleetEnhance" in house.get("/object_info"), "all are known")
        yield house


def lists(house: House) -> list[str]:
    found: list[str] = house.get("/object_info")["CheckpointLoaderSimple"]["input"]["required"]["ckpt_name"][0]
    return found


def any_node(seed: int) -> Json:
    return progress(seed=seed)


def with_checkpoint(name: str, seed: int) -> Json:
    graph = progress(seed=seed)
    graph["8"] = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": name}}
    graph["9"] = {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}}
    graph["10"] = {"class_type": "VAEDecode", "inputs": {"samples": ["9", 0], "vae": ["8", 2]}}
    graph["2"]["inputs"]["images"] = ["10", 0]
    del graph["1"]
    return graph


def enhanced(seed: int) -> Json:
    graph = progress(seed=seed)
    graph["3"] = {"class_type": "FleetEnhance", "inputs": {"image": ["1", 0]}}
    graph["2"]["inputs"]["images"] = ["3", 0]
    return graph


def test_long_integers_of_a_class_stay_as_they_are(three: House) -> None:
    assert three.get("/object_info")["FleetEnhance"]["input"]["optional"]["seed"] == LONG
    assert three.get("/object_info/FleetEnhance") == {"FleetEnhance": ENHANCE}


def test_what_no_node_can_run_is_refused_in_comfyuis_words(three: House) -> None:
    reply = three.post("/prompt", {"prompt": with_checkpoint("lost.safetensors", 1)})
    assert reply.status_code == 400
    (error,) = reply.json()["node_errors"]["8"]["errors"]
    assert error["type"] == "value_not_in_list" and "lost.safetensors" in error["details"]
    both = enhanced(1) | {
        "8": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "none"}},
        "9": {"class_type": "NoSuchNode", "inputs": {}},
    }
    assert three.post("/prompt", {"prompt": both}).json()["error"]["message"] == (
        "Cannot execute because node NoSuchNode does not exist."
    )


def test_what_a_graph_left_in_memory_is_known(three: House) -> None:
    """It is what the next graph with that checkpoint is placed by."""
    prompt_id = three.submit(with_checkpoint("photo.safetensors", 800))
    three.entry(prompt_id)
    with httpx.Client(base_url=three.server.url, timeout=60) as api:
        node_id = api.get(f"/api/queue/jobs/{prompt_id}").json()["node_id"]
        three.until(
            lambda: "photo.safetensors" in api.get(f"/api/nodes/{node_id}").json()["loaded_models"], "it is reported"
        )
    three.post("/history", {"clear": True})


@pytest.mark.timeout(400)
def test_sixty_prompts_land_where_they_can_run_and_survive_a_lost_node(three: House) -> None:
    with ExitStack() as stack:
        names = [f"client-{n}" for n in range(4)]
        clients = {name: stack.enter_context(Listener(three.socket_url, name)) for name in names}
        kinds: dict[str, str] = {}
        owners: dict[str, str] = {}
        for n in range(60):
            kind = ("any", "base", "photo", "enhanced")[n % 4]
            graph = {
                "any": any_node,
                "base": lambda seed: with_checkpoint("base.safetensors", seed),
                "photo": lambda seed: with_checkpoint("photo.safetensors", seed),
                "enhanced": enhanced,
            }[kind](n)
            client = names[n // 15]
            prompt_id = three.submit(copy.deepcopy(graph), client_id=client)
            kinds[prompt_id], owners[prompt_id] = kind, client
        blue = three.nodes["blue"]
        three.until(lambda: len(blue.called("POST", "/prompt")) >= 6, "blue works")
        three.agents["blue"].kill()
        blue.stop()
        for prompt_id, client in owners.items():
            clients[client].wait(kind="end", prompt_id=prompt_id, seconds=200)
        history = three.get("/history")
        assert set(history) == set(kinds)
        assert {entry["status"]["status_str"] for entry in history.values()} == {"success"}
        ran: Counter[str] = Counter()
        can = {"any": {"red", "green", "blue"}, "base": {"red", "green"}}
        with httpx.Client(base_url=three.server.url, timeout=60) as api:
            for prompt_id, kind in kinds.items():
                node_id = api.get(f"/api/queue/jobs/{prompt_id}").json()["node_id"]
                assert node_id in can.get(kind, {"green", "blue"}), (kind, node_id)
                ran[node_id] += 1
        assert set(ran) == {"red", "green", "blue"}
        for node_id, node in three.nodes.items():
            for call in node.called("POST", "/prompt"):
                known = node.script.node_classes
                assert all(one["class_type"] in known for one in call.body["prompt"].values()), node_id
        for name, listener in clients.items():
            ends = Counter(data["prompt_id"] for data in listener.of("end"))
            assert ends == Counter({prompt_id: 1 for prompt_id, owner in owners.items() if owner == name})
            strangers = {data["prompt_id"] for data in listener.of("execution_success")} - set(ends)
            assert not strangers
        image = next(iter(history.values()))["outputs"]["2"]["images"][0]
        assert three.http.get("/view", params=image).content.startswith(b"\x89PNG")
        files = [file["filename"] for entry in history.values() for file in entry["outputs"]["2"]["images"]]
        assert len(set(files)) == 60


def test_a_prompt_for_an_absent_node_waits_and_the_lists_still_name_it(three: House) -> None:
    """green goes too: photo and the custom node are known, and nowhere to be found."""
    three.agents["green"].stop()
    three.until(
        lambda: (
            sum(n["status"] == "online" for n in httpx.get(f"{three.server.url}/api/nodes", timeout=60).json()["nodes"])
            == 1
        ),
        "red is left",
    )
    assert set(lists(three)) == {"base.safetensors", "photo.safetensors"}
    prompt_id = three.submit(enhanced(900))
    assert [item[1] for item in three.get("/queue")["queue_pending"]] == [prompt_id]
    other = three.submit(any_node(901))
    three.entry(other)
    assert [item[1] for item in three.get("/queue")["queue_pending"]] == [prompt_id]
    three.agents["green"].spawn()
    three.entry(prompt_id)


def test_with_every_node_stopped_everything_but_work_goes_on(three: House) -> None:
    done = three.submit(any_node(950))
    entry = three.entry(done)
    for agent in ("red", "green"):
        three.agents[agent].stop()
    for node in three.nodes.values():
        node.stop()
    waiting = three.submit(any_node(951))
    assert three.get(f"/history/{done}")[done] == entry
    assert [item[1] for item in three.get("/queue")["queue_pending"]] == [waiting]
    assert {job["status"] for job in three.get("/api/jobs")["jobs"]} == {"completed", "pending"}
    image = entry["outputs"]["2"]["images"][0]
    assert three.http.get("/view", params=image).status_code == 200
    assert "FleetEnhance" in three.get("/object_info") and three.get("/models/checkpoints")
    assert three.get("/system_stats")["devices"]
    three.post("/queue", {"clear": True})
    assert three.get("/queue") == {"queue_running": [], "queue_pending": []}
