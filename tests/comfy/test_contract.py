"""For each recorded exchange with a real ComfyUI, the gateway in front of a replaying one gives the same: bodies, types
and order, but for ids, times and counters."""

from __future__ import annotations

import io
import json
import uuid
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests import documented
from tests.comfy.client import Listener
from tests.comfy.house import House, progress
from tests.comfy.recorded import body, conversation, heard, plain
from tests.comfy_node import sample

Json = Any


@pytest.mark.parametrize("prefix", ["", "/api"])
@pytest.mark.parametrize(
    "name",
    [
        *("embeddings", "features", "free", "history_empty", "models", "object_info_CheckpointLoaderSimple"),
        *("object_info_EmptyImage", "object_info_KSampler", "object_info_SaveImage", "object_info_missing"),
        *("prompt_get_idle", "queue_idle", "system_stats", "view_missing", "view_traversal"),
        *("err_ckpt_missing", "err_loadimage_missing", "err_missing_input", "err_no_outputs", "err_no_prompt"),
        *("err_unknown_node", "err_value_too_big", "interrupt", "history_clear", "queue_clear", "queue_delete"),
    ],
)
def test_a_recorded_exchange(house: House, name: str, prefix: str) -> None:
    recorded = sample(name)
    asked = recorded["request"]
    if name.startswith("history"):
        house.post("/history", {"clear": True})
    reply = house.http.request(asked["method"], prefix + asked["path"], json=asked["json"])
    wanted = recorded["body"]
    if name in ("object_info_CheckpointLoaderSimple", "err_ckpt_missing"):
        # The node of the recording had no checkpoint, ours has one.
        text = reply.text.replace('["base.safetensors"]', "[]").replace("['base.safetensors']", "[]")
        assert text != reply.text or "base" not in text
        found = json.loads(text)
    else:
        found = {"__text__": reply.text} if "__text__" in (wanted if isinstance(wanted, dict) else ()) else reply.json()
    assert (reply.status_code, plain(found)) == (recorded["status"], plain(wanted))
    if "Content-Type" in recorded["headers"]:
        assert reply.headers["content-type"] == recorded["headers"]["Content-Type"]


def test_what_is_no_json_is_answered_as_the_recording_has_it(house: House) -> None:
    recorded = sample("err_not_json")
    reply = house.http.post("/prompt", content=b"{nope")
    assert (reply.status_code, reply.text) == (recorded["status"], recorded["body"]["__text__"])
    assert reply.headers["content-type"] == recorded["headers"]["Content-Type"]


def _run(house: House, graph: Json, *, metadata: bool = False, **more: Json) -> tuple[str, list[Json]]:
    """A prompt and all that its client hears."""
    client_id = uuid.uuid4().hex
    with Listener(house.socket_url, client_id, metadata=metadata) as client:
        client.wait(kind="feature_flags" if metadata else "status")
        prompt_id = house.submit(graph, client_id=client_id, **more)
        client.wait(kind="end", prompt_id=prompt_id)
        return prompt_id, heard(client.frames)


def test_a_chain_and_the_same_again_from_the_cache(house: House) -> None:
    asked = sample("chain_post_prompt")["request"]["json"]
    # Another seed of the recording's: nothing of it is cached yet.
    prompt_id, frames = _run(house, asked["prompt"], extra_data=asked["extra_data"])
    recorded = conversation("chain_ws")
    assert frames[: len(recorded)] == recorded
    assert frames[len(recorded) :] == [{"type": "executing", "data": {"node": None, "prompt_id": "ID"}}]
    assert plain(house.get(f"/history/{prompt_id}")) == plain(body("history_one"))
    again, frames = _run(house, asked["prompt"])
    recorded = conversation("chain_cached_ws")
    assert frames[: len(recorded)] == recorded
    assert [len(frames), again != prompt_id] == [len(recorded) + 1, True]


@pytest.mark.parametrize(("name", "metadata"), [("progress", False), ("progress_meta_preview", True)])
def test_progress_with_pictures_in_both_framings(house: House, name: str, metadata: bool) -> None:
    recorded_history = next(iter(sample(f"{name}_history").values()))
    graph = recorded_history["prompt"][2]
    graph["1"]["inputs"] |= {"seed": 7 + metadata, "step_ms": 0}
    # Slower than pictures are passed on.
    house.nodes["n1"].script.step_seconds = 0.15
    prompt_id, frames = _run(house, graph, metadata=metadata)
    assert frames == conversation(f"{name}_ws")
    entry = plain(house.get(f"/history/{prompt_id}"))["ID"]
    wanted = plain(recorded_history)
    wanted["prompt"][2] = entry["prompt"][2]
    assert entry == wanted


def test_an_error_of_a_node(house: House) -> None:
    graph = next(iter(sample("error_history").values()))["prompt"][2]
    house.nodes["n1"].script.step_seconds = 0.15
    prompt_id, frames = _run(house, graph)
    assert frames == conversation("error_ws")
    assert plain(house.get(f"/history/{prompt_id}")) == plain(sample("error_history"))
    job = house.get(f"/api/jobs/{prompt_id}")
    assert job["status"] == "failed" and job["execution_error"]["node_type"] == "FleetProgress"


def test_an_interrupted_prompt(house: House) -> None:
    node = house.nodes["n1"]
    node.script.hold_at = 2
    client_id = uuid.uuid4().hex
    with Listener(house.socket_url, client_id) as client:
        graph = next(iter(sample("interrupt_mid_history").values()))["prompt"][2]
        prompt_id = house.submit(graph, client_id=client_id)
        client.wait(kind="progress", prompt_id=prompt_id)
        reply = house.post("/interrupt", {"prompt_id": prompt_id})
        assert (reply.status_code, reply.content) == (200, b"")
        client.wait(kind="end", prompt_id=prompt_id)
        frames = heard(client.frames)
    assert frames == conversation("interrupt_mid_ws")
    assert plain(house.get(f"/history/{prompt_id}")) == plain(sample("interrupt_mid_history"))
    house.until(lambda: node.called("POST", "/interrupt"), "the node is told")
    assert {call.body["prompt_id"] for call in node.called("POST", "/interrupt")} == {prompt_id}, "never all of it"


def test_the_queue_in_its_order_and_what_is_deleted_leaves_no_trace(house: House) -> None:
    node = house.nodes["n1"]
    node.script.hold_at = 1
    running = house.submit(progress(steps=20, seed=100), client_id="first")
    house.until(lambda: house.get("/queue")["queue_running"], "it runs")
    first, second = (house.submit(progress(seed=seed), client_id="other") for seed in (101, 102))
    front = house.post("/prompt", {"prompt": progress(seed=103), "client_id": "other", "front": True}).json()
    assert front["number"] < 0
    queue = house.get("/queue")
    assert plain(queue["queue_running"][0])[3:] == [{"client_id": "first", "create_time": "TIME"}, ["2"]]
    assert [item[1] for item in queue["queue_pending"]] == [front["prompt_id"], first, second]
    came = [item[3]["create_time"] for item in queue["queue_pending"]]
    assert came[1] <= came[2] <= came[0] <= house.get(f"/api/jobs/{front['prompt_id']}")["create_time"]
    assert house.get("/prompt") == {"exec_info": {"queue_remaining": 4}}
    assert house.get(f"/history/{running}") == {}
    house.post("/queue", {"delete": [first, running]})
    assert [item[1] for item in house.get("/queue")["queue_pending"]] == [front["prompt_id"], second]
    assert [item[1] for item in house.get("/queue")["queue_running"]] == [running], "delete is for what waits"
    node.script.release()
    house.entry(second)
    house.entry(running)
    ended = list(house.get("/history"))
    places = [ended.index(one) for one in (running, front["prompt_id"], second)]
    assert places == sorted(places), "what asked to go first did"
    assert house.get(f"/history/{first}") == {}
    house.post("/history", {"delete": [second]})
    assert (house.get(f"/history/{second}"), house.http.get(f"/api/jobs/{second}").status_code) == ({}, 404)


def test_files_by_their_names(house: House) -> None:
    recorded = sample("view_headers")
    prompt_id, _ = _run(house, sample("chain_post_prompt")["request"]["json"]["prompt"])
    (image,) = house.entry(prompt_id)["outputs"]["5"]["images"]
    reply = house.http.get("/view", params=image)
    assert reply.headers["content-type"] == recorded["headers"]["Content-Type"]
    assert plain(reply.headers["content-disposition"]) == plain(recorded["headers"]["Content-Disposition"])
    assert Image.open(io.BytesIO(reply.content)).size == (512, 512)
    smaller = house.http.get("/view", params={**image, "preview": "webp;50"})
    assert smaller.headers["content-type"] == "image/webp"
    assert Image.open(io.BytesIO(smaller.content)).format == "WEBP"
    alpha = house.http.get("/view", params={**image, "channel": "a"})
    assert Image.open(io.BytesIO(alpha.content)).mode == "RGBA"
    part = house.http.get("/view", params=image, headers={"Range": "bytes=0-3"})
    assert (part.status_code, part.content) == (206, b"\x89PNG")
    plain_name = {**image, "filename": "fleet_00001_.png"}
    assert house.http.get("/view", params=plain_name).status_code == 404, "nodes' own names clash"


def test_the_history_in_pages(house: House) -> None:
    house.post("/history", {"clear": True})
    ids = [house.submit(progress(seed=seed)) for seed in range(200, 203)]
    for prompt_id in ids:
        house.entry(prompt_id)
    assert list(house.get("/history")) == ids
    assert list(house.get("/history", max_items="2")) == ids[1:]
    assert list(house.get("/history", max_items="1", offset="1")) == ids[1:2]
    jobs = house.get("/api/jobs", status="completed", limit="2", sort_order="asc")
    assert [job["id"] for job in jobs["jobs"]] == ids[:2]
    assert jobs["pagination"] == {"offset": 0, "limit": 2, "total": 3, "has_more": True}
    assert jobs["jobs"][0]["preview_output"]["filename"].endswith(".png")
    assert house.http.get("/api/jobs", params={"status": "lost"}).status_code == 400
    detail = house.get(f"/api/jobs/{ids[0]}")
    assert detail["workflow"]["prompt"] == progress(seed=200) and "2" in detail["outputs"]


def test_a_front_end_gets_its_page_and_no_more(house: House) -> None:
    assert "<title>ComfyUI</title>" in house.http.get("/").text
    assert house.get("/extensions") == []
    for path in ("/customnode/install", "/manager/reboot", "/api/manager/queue/start", "/extensions/%2e%2e/prompt"):
        assert house.http.get(path).status_code == 404
        assert house.http.post(path, json={}).status_code == 404
    assert not [call for call in house.nodes["n1"].calls if "manager" in call.path or "install" in call.path]


def test_the_documented_lines(house: House, tmp_path: Path) -> None:
    graph = {"{...workflow_json...}": json.dumps(progress(seed=300))}
    taken = documented.reply(documented.COMFY_PROMPT, house.url, tmp_path, graph)
    assert taken["node_errors"] == {} and set(taken) == {"prompt_id", "number", "node_errors"}
    assert set(documented.reply(documented.COMFY_QUEUE, house.url, tmp_path)) == {"queue_running", "queue_pending"}
    house.entry(taken["prompt_id"])
    history = documented.reply(documented.COMFY_HISTORY, house.url, tmp_path)
    assert history[taken["prompt_id"]]["status"]["status_str"] == "success"
    assert "FleetProgress" in documented.reply(documented.COMFY_OBJECT_INFO, house.url, tmp_path)
