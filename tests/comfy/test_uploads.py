"""Uploaded files: kept under ids, named as ComfyUI names them, on the node before the prompt is."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import grpc
import pytest
from fleet.v1 import queue_pb2, queue_pb2_grpc, types_pb2
from PIL import Image

from tests.comfy.client import Listener
from tests.comfy.house import House, house_in

Json = Any


def picture(color: str = "red", mode: str = "RGB") -> bytes:
    out = io.BytesIO()
    Image.new(mode, (8, 8), color).save(out, "PNG")
    return out.getvalue()


def load(name: str) -> Json:
    return {
        "1": {"class_type": "LoadImage", "inputs": {"image": name}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "loaded"}},
    }


def upload(house: House, name: str, data: bytes, **fields: str) -> Json:
    reply = house.http.post("/upload/image", files={"image": (name, data, "image/png")}, data=fields)
    assert reply.status_code == 200, reply.text
    return reply.json()


@pytest.mark.parametrize("name", ["in.png", "käse (1) [x].png", "空 白.png", "a..b.png"])
def test_a_file_reaches_the_node_before_its_prompt(house: House, name: str) -> None:
    data = picture()
    kept = upload(house, name, data)
    assert kept == {"name": name, "subfolder": "", "type": "input"}
    assert house.http.get("/view", params={"filename": name, "type": "input"}).content == data
    entry = house.entry(house.submit(load(name)))
    assert entry["status"]["completed"]
    node = house.nodes["n1"]
    files = node.app.files.data
    sent = node.called("POST", "/prompt")[-1].body["prompt"]["1"]["inputs"]["image"]
    assert re.fullmatch(f"fleet-[0-9a-f]{{32}}-{re.escape(name)}", sent), "nobody else's graph finds it there"
    assert files["input", "", sent] == data, "where node classes look for what they list"
    assert entry["prompt"][2] == load(name), "who submitted it sees what was submitted"
    paths = [call.path for call in node.calls if call.path in ("/upload/image", "/prompt")]
    assert paths.index("/upload/image") < len(paths) - 1 and paths[-1] == "/prompt"


def test_a_file_that_goes_while_it_is_asked_for_is_not_there(house: House) -> None:
    """Its time is over between the look at its name and that at its bytes: a 404, no broken body."""
    folder = house.server.folder / "inputs"
    before = set(folder.iterdir())
    upload(house, "going.png", picture("purple"))
    for path in set(folder.iterdir()) - before:
        path.unlink()
    assert house.http.get("/view", params={"filename": "going.png", "type": "input"}).status_code == 404


def test_a_name_that_is_taken(house: House) -> None:
    red, blue, green = picture("red"), picture("blue"), picture("green")
    assert upload(house, "t.png", red)["name"] == "t.png"
    assert upload(house, "t.png", red)["name"] == "t.png", "the same file is the same"
    assert upload(house, "t.png", blue)["name"] == "t (1).png"
    assert upload(house, "t.png", blue)["name"] == "t (1).png"
    assert upload(house, "t.png", green)["name"] == "t (2).png"
    assert upload(house, "t.png", green, overwrite="true")["name"] == "t.png"
    assert house.http.get("/view", params={"filename": "t.png", "type": "input"}).content == green


def test_folders_and_types(house: House) -> None:
    kept = upload(house, "s.png", picture(), subfolder="a/b", type="temp")
    assert kept == {"name": "s.png", "subfolder": "a/b", "type": "temp"}
    asked = {"filename": "s.png", "subfolder": "a/b"}
    assert house.http.get("/view", params={**asked, "type": "temp"}).status_code == 200
    assert house.http.get("/view", params={**asked, "type": "input"}).status_code == 404
    upload(house, "s.png", picture("blue"), subfolder="a")
    assert house.entry(house.submit(load("a/s.png")))["status"]["completed"]


def test_a_mask_takes_the_place_of_the_alpha(house: House) -> None:
    upload(house, "base.png", picture("green"))
    mask = Image.new("RGBA", (8, 8), (0, 0, 0, 7))
    out = io.BytesIO()
    mask.save(out, "PNG")
    reply = house.http.post(
        "/upload/mask",
        files={"image": ("masked.png", out.getvalue(), "image/png")},
        data={"original_ref": '{"filename": "base.png", "type": "input"}', "subfolder": "clipspace"},
    )
    assert reply.json() == {"name": "masked.png", "subfolder": "clipspace", "type": "input"}
    made = house.http.get("/view", params={"filename": "masked.png", "subfolder": "clipspace", "type": "input"})
    assert Image.open(io.BytesIO(made.content)).getpixel((0, 0)) == (0, 128, 0, 7)


def test_an_output_may_be_an_input(house: House) -> None:
    upload(house, "first.png", picture())
    (image,) = house.entry(house.submit(load("first.png")))["outputs"]["2"]["images"]
    entry = house.entry(house.submit(load(f"{image['filename']} [output]")))
    assert entry["status"]["completed"], entry
    lost = house.post("/prompt", {"prompt": load(image["filename"].replace("loaded", "other") + " [output]")})
    assert lost.status_code == 400


def test_bad_uploads(house: House) -> None:
    data = picture()
    for name in ("../x.png", "a/b.png", "\\x.png", "."):
        reply = house.http.post("/upload/image", files={"image": (name, data)})
        assert reply.status_code == 400 or "/" not in reply.json()["name"]
    assert (
        house.http.post("/upload/image", files={"image": ("x.png", data)}, data={"subfolder": "../.."}).status_code
        == 400
    )
    assert house.http.post("/upload/image", files={"image": ("x.png", data)}, data={"type": "model"}).status_code == 400
    assert house.http.post("/upload/image", data={"image": "text"}).status_code == 400
    assert house.http.post("/upload/image", content=b"x", headers={"content-type": "text/plain"}).status_code == 400
    broken = {"content-type": "multipart/form-data; boundary=b"}
    assert house.http.post("/upload/image", content=b"--b\r\nnonsense", headers=broken).status_code == 400
    reply = house.http.post("/upload/mask", files={"image": ("m.png", b"no picture")}, data={"original_ref": "[]"})
    assert reply.status_code == 400
    with Listener(house.socket_url) as client:
        client.wait(kind="status")


def test_what_a_waiting_prompt_needs_outlives_its_time(tmp_path: Path) -> None:
    with house_in(tmp_path, {"FLEET_INPUT_TTL_SECONDS": "10"}) as house:
        house.join("n1")
        house.settled()
        house.until(lambda: "LoadImage" in house.get("/object_info"), "its classes are known")
        house.agents["n1"].stop()
        upload(house, "needed.png", picture("blue"))
        prompt_id = house.submit(load("needed.png"))
        # What nobody needs is over later than that which came before it would be.
        upload(house, "other.png", picture("green"))
        asked = {"filename": "other.png", "type": "input"}
        house.until(lambda: house.http.get("/view", params=asked).status_code == 404, "its time is over")
        assert [item[1] for item in house.get("/queue")["queue_pending"]] == [prompt_id]
        house.agents["n1"].spawn()
        assert house.entry(prompt_id)["status"]["completed"]


def test_a_workflow_of_the_queue_keeps_large_seeds_and_names_its_files(house: House) -> None:
    seed = 2**64 - 1
    upload(house, "w.png", picture())
    graph = load("w.png")
    graph["3"] = {
        "class_type": "FleetProgress",
        "inputs": {"width": 64, "height": 64, "steps": 1, "seed": seed, "step_ms": 0, "fail_at": 0},
    }
    graph["4"] = {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "w.png"}}
    api = f"{house.server.url}/api/queue/jobs"
    reply = house.http.post(api, json={"job_type": "image_gen", "payload": {"workflow": graph}})
    assert reply.status_code == 200, reply.text
    job_id = reply.json()["job_id"]
    job = house.until(lambda: (j := house.http.get(f"{api}/{job_id}").json())["status"] == "succeeded" and j, "done")
    assert job["payload"]["workflow"]["3"]["inputs"]["seed"] == str(seed)
    assert len(job["result"]["outputs"]) == 2
    sent = next(c.body for c in house.nodes["n1"].called("POST", "/prompt") if c.body["prompt_id"] == job_id)
    assert sent["prompt"]["3"]["inputs"]["seed"] == seed
    assert sent["prompt"]["1"]["inputs"]["image"].endswith("-w.png")
    assert sent["prompt"]["4"]["inputs"]["filename_prefix"] == "w.png", "what names no file stays"
    with grpc.insecure_channel(f"127.0.0.1:{house.server.grpc_port}") as channel:
        request = queue_pb2.CreateJobRequest(job_type=types_pb2.JOB_TYPE_IMAGE_GEN, workflow_json=json.dumps(graph))
        request.payload.SetInParent()
        typed = queue_pb2_grpc.QueueStub(channel).CreateJob(request, timeout=60).receipt.job_id
    house.until(lambda: house.http.get(f"{api}/{typed}").json()["status"] == "succeeded", "it runs too")
    again = next(c.body for c in house.nodes["n1"].called("POST", "/prompt") if c.body["prompt_id"] == typed)
    assert again["prompt"] == sent["prompt"], "by gRPC it is the same"
    for wrong, word in (
        ({"workflow": [1]}, "payload.workflow: must be an object"),
        ({"workflow": {}}, "payload.workflow: must be a graph"),
        ({"workflow": graph, "prompt": "x"}, "payload.prompt: must be left out"),
    ):
        refused = house.http.post(api, json={"job_type": "image_gen", "payload": wrong})
        assert refused.status_code == 400 and word in refused.json()["detail"], refused.text
    lonely = {"1": {"class_type": "NotYetThere", "inputs": {}}}
    waits = house.http.post(api, json={"job_type": "image_gen", "payload": {"workflow": lonely}}).json()
    assert waits["wait_reason"] == "NO_NODE"
    house.http.delete(f"{api}/{waits['job_id']}")
