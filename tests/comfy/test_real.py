"""A real ComfyUI and the gateway in front of it: the same calls to both, and the answers compared.

No package carries its server, so that FLEET_TEST_COMFYUI has to name one that runs (its URL; on CPU will do, with
`--preview-method auto` and `progress_node.py` of this folder among its custom nodes). Nobody else may use it meanwhile.
"""

from __future__ import annotations

import io
import itertools
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.comfy.client import Listener
from tests.comfy.house import house_in, progress
from tests.comfy.recorded import heard, plain
from tests.comfy_node import sample
from tests.waiting import wait_until_now

REAL = os.environ.get("FLEET_TEST_COMFYUI", "").rstrip("/")
pytestmark = pytest.mark.skipif(not REAL, reason="FLEET_TEST_COMFYUI names no running ComfyUI")
Json = Any
_FRESH = itertools.count(int(time.time()) % 10_000_000)
"""Colours and seeds that this ComfyUI has not seen, so that it has nothing cached of them."""
_VARIED = ("color", "seed")


@dataclass(frozen=True)
class Door:
    """Where a client calls: ComfyUI itself, or the gateway."""

    http: httpx.Client
    socket_url: str

    def get(self, path: str, **params: str) -> Json:
        """The JSON of a GET."""
        reply = self.http.get(path, params=params)
        assert reply.status_code == 200, (path, reply.status_code, reply.text)
        return reply.json()

    def submit(self, graph: Json, **more: Json) -> str:
        """The id of a prompt that is taken."""
        reply = self.http.post("/prompt", json={"prompt": graph, **more})
        assert reply.status_code == 200, reply.text
        return str(reply.json()["prompt_id"])

    def entry(self, prompt_id: str) -> Json:
        """The prompt's entry in the history, once it is there."""
        return wait_until_now(lambda: self.get(f"/history/{prompt_id}").get(prompt_id), seconds=50)

    def run(self, graph: Json, *, metadata: bool = False, **more: Json) -> tuple[str, list[Json]]:
        """A prompt and all that its client hears."""
        client_id = uuid.uuid4().hex
        with Listener(self.socket_url, client_id, metadata=metadata) as client:
            client.wait(kind="feature_flags" if metadata else "status")
            prompt_id = self.submit(graph, client_id=client_id, **more)
            client.wait(kind="end", prompt_id=prompt_id)
            return prompt_id, heard(client.frames)


@pytest.fixture(scope="module")
def doors() -> Iterator[tuple[Door, Door]]:
    """ComfyUI's own, and the gateway's."""
    with (
        tempfile.TemporaryDirectory(prefix="fleet-") as folder,
        house_in(Path(folder)) as house,
        httpx.Client(base_url=REAL, timeout=60, trust_env=False) as http,
    ):
        house.attach("real", REAL)
        house.until(lambda: "EmptyImage" in house.get("/object_info"), "the node is looked at", 50)
        http.post("/history", json={"clear": True})
        yield Door(http, REAL.replace("http", "ws", 1) + "/ws"), Door(house.http, house.socket_url)


def same(doors: tuple[Door, Door], ask: Callable[[Door], Json]) -> Json:
    """What both answer, made comparable."""
    straight, through = (alike(ask(door)) for door in doors)
    found = list(differences(straight, through))
    assert not found, "\n".join(found[:20])
    return through


def differences(straight: Json, through: Json, path: str = "") -> Iterator[str]:
    """Where two answers differ, and how; the order of names too, as clients show them in it."""
    if isinstance(straight, dict) and isinstance(through, dict) and list(straight) == list(through):
        for name in straight:
            yield from differences(straight[name], through[name], f"{path}/{name}")
    elif isinstance(straight, list) and isinstance(through, list) and len(straight) == len(through):
        for place, (left, right) in enumerate(zip(straight, through, strict=True)):
            yield from differences(left, right, f"{path}/{place}")
    elif straight != through or type(straight) is not type(through) or isinstance(straight, dict):
        yield f"{path}: straight {str(straight)[:400]}, through the gateway {str(through)[:400]}"


def alike(value: Json) -> Json:
    """Without ids, times, counters, and what `_FRESH` gave."""

    def still(one: Json) -> Json:
        if isinstance(one, dict):
            return {name: 0 if name in _VARIED else still(item) for name, item in one.items()}
        return [still(item) for item in one] if isinstance(one, list | tuple) else one

    return plain(still(value))


def chain(size: int = 256) -> Json:
    """EmptyImage, ImageScale, ImageBlur, SaveImage."""
    graph: Json = {
        "1": {"class_type": "EmptyImage", "inputs": {"width": size, "height": size, "batch_size": 1}},
        "2": {"class_type": "ImageScale", "inputs": {"image": ["1", 0], "upscale_method": "lanczos"}},
        "3": {"class_type": "ImageBlur", "inputs": {"image": ["2", 0], "blur_radius": 15, "sigma": 3.0}},
        "4": {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "fleet"}},
    }
    graph["1"]["inputs"]["color"] = next(_FRESH)
    graph["2"]["inputs"] |= {"width": 128, "height": 96, "crop": "disabled"}
    return graph


def test_a_chain_and_the_same_again_from_the_cache(doors: tuple[Door, Door]) -> None:
    def ask(door: Door) -> Json:
        graph, told = chain(), []
        for _ in range(2):
            prompt_id, frames = door.run(graph, extra_data={"extra_pnginfo": {"workflow": {"note": "x"}}})
            entry = door.get(f"/history/{prompt_id}")
            assert list(entry[prompt_id]["prompt"][3]) == ["extra_pnginfo", "client_id", "create_time"]
            told.append((frames, entry, timeless(door.get(f"/api/jobs/{prompt_id}"))))
        return told

    (first, _, _), (second, _, _) = same(doors, ask)
    assert [frame["data"]["node"] for frame in first if frame["type"] == "executing"] == ["1", "2", "3", "4", None]
    assert [frame["data"]["nodes"] for frame in second if frame["type"] == "execution_cached"] == [["1", "2", "3", "4"]]


@pytest.mark.parametrize("metadata", [False, True])
def test_progress_with_pictures_in_both_framings(doors: tuple[Door, Door], metadata: bool) -> None:
    # Slower than pictures are passed on.
    frames = same(doors, lambda door: door.run(progress(seed=next(_FRESH), step_ms=150), metadata=metadata)[1])
    assert frames.count("binary 4" if metadata else "binary 1") == 4


def test_an_error_of_a_node(doors: tuple[Door, Door]) -> None:
    def ask(door: Door) -> Json:
        prompt_id, frames = door.run(progress(seed=next(_FRESH), step_ms=150, fail_at=3))
        return frames, door.get(f"/history/{prompt_id}"), timeless(door.get(f"/api/jobs/{prompt_id}"))

    frames, history, _ = same(doors, ask)
    assert frames[-3]["type"] == "execution_error" and history["ID"]["status"]["status_str"] == "error"


def timeless(job: Json) -> Json:
    """A job of /api/jobs without its times and counters; what newer versions tell more is left out."""
    more = ("execution_start_time", "execution_end_time", "previewable_outputs_count", "priority")
    return {name: item for name, item in job.items() if name not in more}


def long_chain() -> Json:
    """As the chain, but with forty nodes that take a while each."""
    graph = chain(512)
    graph["2"]["inputs"] |= {"width": 512, "height": 512}
    for number in range(5, 45):
        inputs = {"image": [str(number - 1) if number > 5 else "3", 0], "blur_radius": 31, "sigma": 5.0}
        graph[str(number)] = {"class_type": "ImageBlur", "inputs": inputs}
    graph["4"]["inputs"]["images"] = ["44", 0]
    return graph


def test_interrupts_and_the_queue(doors: tuple[Door, Door]) -> None:
    def ask(door: Door) -> Json:
        client_id = uuid.uuid4().hex
        with Listener(door.socket_url, client_id) as client:
            client.wait(kind="status")
            prompt_id = door.submit(long_chain(), client_id=client_id)
            wait_until_now(lambda: "2" in [data["node"] for data in client.of("executing", prompt_id)], seconds=40)
            waiting = [door.submit(chain(), client_id=client_id) for _ in range(2)]
            found = [door.get("/queue"), door.get("/prompt"), door.get(f"/history/{prompt_id}")]
            assert [item[1] for item in found[0]["queue_pending"]] == waiting
            deleted = door.http.post("/queue", json={"delete": [waiting[0]]})
            found.append((deleted.status_code, deleted.text, door.get("/queue")))
            reply = door.http.post("/interrupt", json={"prompt_id": prompt_id})
            found.append((reply.status_code, reply.text))
            client.wait(kind="end", prompt_id=prompt_id)
            entry = door.entry(prompt_id)
            assert entry["status"]["messages"][-1][0] == "execution_interrupted"
            assert door.entry(waiting[1])["status"]["completed"]
            stopped = client.of("execution_interrupted", prompt_id)
            assert len(stopped) == 1
            return found, sorted(stopped[0]), entry["prompt"], sorted(entry), entry["status"]["status_str"]

    same(doors, ask)


@pytest.mark.parametrize("name", ["unknown node", "value too big", "missing input", "no output", "no such file"])
def test_what_is_refused(doors: tuple[Door, Door], name: str) -> None:
    graph = chain()
    if name == "unknown node":
        graph["3"]["class_type"] = "NoSuchNode"
    elif name == "value too big":
        graph["3"]["inputs"]["blur_radius"] = 1000
    elif name == "missing input":
        del graph["2"]["inputs"]["width"]
    elif name == "no output":
        del graph["4"]
    else:
        graph["1"] = {"class_type": "LoadImage", "inputs": {"image": "nowhere.png"}}

    def ask(door: Door) -> Json:
        reply = door.http.post("/prompt", json={"prompt": graph})
        return reply.status_code, reply.headers["content-type"], reply.json()

    assert same(doors, ask)[0] == 400


def test_one_output_of_two_is_refused(doors: tuple[Door, Door]) -> None:
    def ask(door: Door) -> Json:
        graph = chain() | {"9": {"class_type": "SaveImage", "inputs": {"images": ["1", 0]}}}
        reply = door.http.post("/prompt", json={"prompt": graph})
        body = reply.json()
        entry = door.entry(body["prompt_id"])
        del body["number"]
        return reply.status_code, body, entry

    assert same(doors, ask)[1]["node_errors"]["9"]["errors"][0]["type"] == "required_input_missing"


def test_an_upload_and_the_picture_made_of_it(doors: tuple[Door, Door]) -> None:
    out = io.BytesIO()
    Image.new("RGB", (40, 30), (next(_FRESH) % 256, 3, 3)).save(out, "PNG")
    name = f"käse ({next(_FRESH)}) [x].png"

    def ask(door: Door) -> Json:
        reply = door.http.post("/upload/image", files={"image": (name, out.getvalue(), "image/png")})
        graph = {
            "1": {"class_type": "LoadImage", "inputs": {"image": reply.json()["name"]}},
            "2": {"class_type": "ImageInvert", "inputs": {"image": ["1", 0]}},
            "3": {"class_type": "PreviewImage", "inputs": {"images": ["2", 0]}},
        }
        _, frames = door.run(graph)
        (image,) = next(frame["data"]["output"]["images"] for frame in frames if frame["type"] == "executed")
        back = door.http.get("/view", params={"filename": name, "type": "input"})
        return reply.status_code, reply.json(), sorted(image), image["type"], back.content == out.getvalue()

    assert same(doors, ask)[-1]


def test_files_by_their_names(doors: tuple[Door, Door]) -> None:
    def ask(door: Door) -> Json:
        (image,) = door.entry(door.submit(chain()))["outputs"]["4"]["images"]
        found = door.http.get("/view", params=image)
        assert Image.open(io.BytesIO(found.content)).size == (128, 96)
        small = door.http.get("/view", params={**image, "preview": "webp;50"})
        alpha = door.http.get("/view", params={**image, "channel": "a"})
        return [
            found.headers["content-type"],
            found.headers["content-disposition"],
            (small.status_code, small.headers["content-type"]),
            (alpha.status_code, alpha.headers["content-type"]),
            door.http.get("/view", params={"filename": "nowhere.png"}).status_code,
            door.http.get("/view", params={"filename": "../x.png"}).status_code,
            door.http.get("/view", params={"filename": "x.png", "subfolder": "../.."}).status_code,
        ]

    same(doors, ask)


@pytest.mark.parametrize("prefix", ["", "/api"])
@pytest.mark.parametrize("path", ["/object_info", "/object_info/KSampler", "/models", "/embeddings", "/features"])
def test_what_there_is(doors: tuple[Door, Door], path: str, prefix: str) -> None:
    def ask(door: Door) -> Json:
        found = door.get(prefix + path)
        for name in ("LoadImage", "LoadImageMask"):
            # Of files that came meanwhile the fleet hears within a minute.
            if name in found:
                found[name]["input"]["required"]["image"][0] = []
        return found

    same(doors, ask)


def test_the_machine(doors: tuple[Door, Door], record_property: Callable[[str, object], None]) -> None:
    def ask(door: Door) -> Json:
        found = door.get("/system_stats")
        steady = {name: value for name, value in found["system"].items() if name != "ram_free"}
        return steady, [sorted(device) for device in found["devices"]]

    system, _ = same(doors, ask)
    record_property("comfyui_version", system["comfyui_version"])


@pytest.mark.parametrize(
    "name", ["err_no_prompt", "err_not_json", "history_empty", "object_info_missing", "queue_idle", "prompt_get_idle"]
)
def test_a_recorded_request(doors: tuple[Door, Door], name: str) -> None:
    asked = sample(name)["request"]

    def ask(door: Door) -> Json:
        if name.startswith("history"):
            door.http.post("/history", json={"clear": True})
        content = {"content": b"{nope"} if name == "err_not_json" else {"json": asked["json"]}
        reply = door.http.request(asked["method"], asked["path"], **content)
        said = reply.text if name == "err_not_json" else reply.json()
        return reply.status_code, said, reply.headers["content-type"]

    same(doors, ask)
