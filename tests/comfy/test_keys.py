"""With keys: who may call, by which header, and what each sees of the others."""

from __future__ import annotations

import base64
import io
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from websockets.exceptions import InvalidStatus

from tests.comfy.client import Listener
from tests.comfy.house import House, house_in, progress
from tests.comfy.test_uploads import load
from tests.comfy_node import Failure, Script

Json = Any
KEYS = {"ann": "ann-key-0123456789abcdef", "bob": "bob-key-0123456789abcdef", "boss": "boss-key-0123456789abcdef"}


def headers(name: str) -> dict[str, str]:
    return {"X-API-Key": KEYS[name]}


@pytest.fixture(scope="module")
def house() -> Iterator[House]:
    with tempfile.TemporaryDirectory(prefix="fleet-") as folder:
        file = Path(folder) / "keys"
        lines = [f"{name}:{key}{':admin' if name == 'boss' else ''}" for name, key in KEYS.items()]
        file.write_text("\n".join([*lines, "agent:agent-key-0123456789abcdef:admin"]) + "\n")
        file.chmod(0o600)
        with house_in(Path(folder), {"FLEET_API_KEYS_FILE": str(file)}) as found:
            found.http.headers.update(headers("boss"))
            found.join("n1", Script(), FLEET_API_KEY="agent-key-0123456789abcdef")
            found.settled()
            yield found


def test_a_key_is_asked_for_and_taken_in_three_ways(house: House) -> None:
    with httpx.Client(base_url=house.url, timeout=60) as client:
        for path in ("/queue", "/api/queue", "/view", "/", "/object_info"):
            reply = client.get(path)
            assert reply.status_code == 401 and reply.headers["www-authenticate"].startswith("Basic ")
            assert reply.json()["reason"] == "API_KEY_MISSING"
        basic = base64.b64encode(f"anybody:{KEYS['ann']}".encode()).decode()
        for given in (headers("ann"), {"Authorization": f"Bearer {KEYS['ann']}"}, {"Authorization": f"Basic {basic}"}):
            assert client.get("/queue", headers=given).status_code == 200
            with Listener(house.socket_url, "ann", headers=given) as socket:
                socket.wait(kind="status")
        for wrong in ({"X-API-Key": "no"}, {"Authorization": "Basic !!!"}, {"Authorization": "Basic bm8="}):
            assert client.get("/queue", headers=wrong).status_code == 401
    with pytest.raises(InvalidStatus) as refused:
        Listener(house.socket_url, "ann")
    assert refused.value.response.status_code == 401


def test_an_owner_sees_its_own_and_an_admin_all(house: House) -> None:
    node = house.nodes["n1"]
    node.script.hold_at = 1
    with (
        httpx.Client(base_url=house.url, headers=headers("ann"), timeout=60) as ann,
        httpx.Client(base_url=house.url, headers=headers("bob"), timeout=60) as bob,
        Listener(house.socket_url, "same", headers=headers("bob")) as spy,
        Listener(house.socket_url, "same", headers=headers("ann")) as own,
    ):
        ids = [
            ann.post("/prompt", json={"prompt": progress(seed=seed), "client_id": "same"}).json()["prompt_id"]
            for seed in (1, 2)
        ]
        house.until(lambda: ann.get("/queue").json()["queue_running"], "it runs")
        assert bob.get("/queue").json() == {"queue_running": [], "queue_pending": []}
        assert bob.get("/prompt").json() == {"exec_info": {"queue_remaining": 2}}, "how long the line is, all may know"
        # Nothing that bob does touches them.
        bob.post("/interrupt", json={"prompt_id": ids[0]})
        bob.post("/interrupt")
        bob.post("/queue", json={"delete": ids, "clear": True})
        assert bob.post(f"/api/jobs/{ids[1]}/cancel").json() == {"cancelled": False}
        assert bob.get(f"/api/jobs/{ids[0]}").status_code == 404
        taken = bob.post("/prompt", json={"prompt": progress(seed=3), "prompt_id": ids[0]})
        assert taken.json()["error"]["type"] == "invalid_prompt_id"
        node.script.release()
        for prompt_id in ids:
            own.wait(kind="end", prompt_id=prompt_id)
        assert {kind for kind in spy.kinds() if kind != "status"} == set()
        entry = ann.get(f"/history/{ids[0]}").json()[ids[0]]
        assert bob.get(f"/history/{ids[0]}").json() == {} and bob.get("/history").json() == {}
        bob.post("/history", json={"clear": True, "delete": ids})
        assert set(ann.get("/history").json()) == set(ids)
        image = entry["outputs"]["2"]["images"][0]
        assert (ann.get("/view", params=image).status_code, bob.get("/view", params=image).status_code) == (200, 404)
        assert set(house.get("/history")) >= set(ids)
        assert house.http.get("/view", params=image).status_code == 200


def test_uploads_are_ones_own(house: House) -> None:
    with (
        httpx.Client(base_url=house.url, headers=headers("ann"), timeout=60) as ann,
        httpx.Client(base_url=house.url, headers=headers("bob"), timeout=60) as bob,
    ):
        png = b"\x89PNG\r\n\x1a\nann"
        assert ann.post("/upload/image", files={"image": ("a.png", png)}).json()["name"] == "a.png"
        assert bob.post("/upload/image", files={"image": ("a.png", b"bob")}).json()["name"] == "a.png"
        asked = {"filename": "a.png", "type": "input"}
        assert ann.get("/view", params=asked).content == png
        assert bob.get("/view", params=asked).content == b"bob"
        assert house.http.get("/view", params=asked).status_code == 404


def test_what_lies_at_a_node_is_its_owners(house: House) -> None:
    """Nodes have one folder of inputs and one of outputs for everybody; a running prompt opens neither."""
    node = house.nodes["n1"]
    with (
        httpx.Client(base_url=house.url, headers=headers("ann"), timeout=60) as ann,
        httpx.Client(base_url=house.url, headers=headers("bob"), timeout=60) as bob,
        Listener(house.socket_url, "hears", headers=headers("ann")) as own,
    ):
        out = io.BytesIO()
        Image.new("RGB", (8, 8), "red").save(out, "PNG")
        assert ann.post("/upload/image", files={"image": ("secret.png", out.getvalue())}).status_code == 200
        node.script.failures["LoadImage"] = [Failure()]
        failed = ann.post("/prompt", json={"prompt": load("secret.png"), "client_id": "hears"}).json()["prompt_id"]
        own.wait(kind="end", prompt_id=failed)
        done = ann.post("/prompt", json={"prompt": load("secret.png"), "client_id": "hears"}).json()["prompt_id"]
        own.wait(kind="end", prompt_id=done)
        sent = node.called("POST", "/prompt")[-1].body["prompt"]["1"]["inputs"]["image"]
        assert sent != "secret.png"
        told = json.dumps([frame for frame in own.frames if isinstance(frame, dict)])
        told += ann.get("/history").text + ann.get(f"/api/jobs/{failed}").text
        assert sent.partition("/")[0] not in told, "clients hear of the names that they gave"
        for name in ("secret.png", sent):
            refused = bob.post("/prompt", json={"prompt": load(name)})
            missing = bob.post("/prompt", json={"prompt": load("never-there.png")})
            assert refused.status_code == missing.status_code == 400
            assert refused.json() == json.loads(missing.text.replace("never-there.png", name))
        # A file of ann's, asked for as one of a prompt of bob's that runs on the same node.
        (image,) = ann.get(f"/history/{done}").json()[done]["outputs"]["2"]["images"]
        node.script.hold_at = 1
        running = bob.post("/prompt", json={"prompt": progress(seed=77)}).json()["prompt_id"]
        assert node.script.held.wait(50)
        plain = image["filename"].replace(done.replace("-", ""), running.replace("-", ""))
        assert bob.get("/view", params={**image, "filename": plain}).status_code == 404
        assert ann.get("/view", params=image).status_code == 200
        node.script.release()
        house.until(lambda: bob.get(f"/history/{running}").json(), "it is over")


def test_what_is_everybodys_is_for_admins(house: House) -> None:
    with httpx.Client(base_url=house.url, headers=headers("ann"), timeout=60) as ann:
        assert ann.post("/free", json={"unload_models": True}).status_code == 403
        assert ann.post("/settings", json={"a": 1}).status_code == 403
        assert ann.get("/internal/logs").status_code == 403
        assert ann.get("/").status_code == 200
    assert house.post("/free", {"unload_models": True}).status_code == 200
    assert house.nodes["n1"].called("POST", "/free")


def test_a_key_that_is_withdrawn_ends_its_sockets(house: House) -> None:
    file = house.folder / "keys"
    with Listener(house.socket_url, "ann", headers=headers("ann")) as socket:
        socket.wait(kind="status")
        text = file.read_text()
        file.write_text("".join(line for line in text.splitlines(True) if not line.startswith("ann:")))
        assert socket.wait_closed() == 1008
        file.write_text(text)
