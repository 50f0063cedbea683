"""The replaying node says what the recorded one said: bodies, types, order; ids, times and counters apart."""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from websockets.sync.client import ClientConnection, connect

from tests.comfy_node import ComfyNode, sample


@pytest.fixture
def node() -> Iterator[ComfyNode]:
    with ComfyNode(checkpoints=()) as node:
        yield node


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    with httpx.Client(trust_env=False) as client:
        yield client


@contextlib.contextmanager
def _open(node: ComfyNode, client_id: str, *, metadata: bool = False) -> Iterator[ClientConnection]:
    with connect(f"ws://127.0.0.1:{node.port}/ws?clientId={client_id}", max_size=None) as socket:
        if metadata:
            socket.send(json.dumps({"type": "feature_flags", "data": {"supports_preview_metadata": True}}))
        yield socket


def _until_over(socket: ClientConnection) -> list[Any]:
    """Frames up to the `executing` without a node."""
    frames: list[Any] = []
    while True:
        frame = socket.recv(timeout=60)
        frames.append(json.loads(frame) if isinstance(frame, str) else frame)
        if isinstance(frames[-1], dict) and frames[-1]["data"].get("node", "") is None:
            return frames


def _shape(frame: Any) -> Any:
    """A frame without ids and times; the bytes of a picture without the picture."""
    if isinstance(frame, bytes):
        kind = struct.unpack(">I", frame[:4])[0]
        if kind == 1:
            return kind, struct.unpack(">I", frame[4:8])[0], frame[8:12].hex()
        head = json.loads(frame[8 : 8 + struct.unpack(">I", frame[4:8])[0]])
        return kind, _plain(head)
    if "__binary_bytes" in frame:
        if frame["event_type_be32"] == 1:
            return 1, frame["format_be32"], frame["image_magic_hex"]
        return 4, _plain(frame["metadata"])
    return _plain({name: value for name, value in frame.items() if name != "__t"})


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        left_out = {"prompt_id", "timestamp", "sid", "traceback"}
        return {name: _plain(one) for name, one in value.items() if name not in left_out}
    return [_plain(one) for one in value] if isinstance(value, list) else value


def _recorded(name: str) -> list[Any]:
    frames = [_shape(frame) for frame in sample(name)]
    # Some recordings were ended at the status that comes before it.
    if frames[-1] != {"type": "executing", "data": {"node": None}}:
        frames.append({"type": "executing", "data": {"node": None}})
    return frames


@pytest.mark.parametrize("name", ["no_prompt", "unknown_node", "no_outputs", "missing_input", "value_too_big"])
def test_bad_prompts_get_the_recorded_errors(node: ComfyNode, http: httpx.Client, name: str) -> None:
    recorded = sample(f"err_{name}")
    reply = http.post(f"{node.url}/prompt", json=recorded["request"]["json"])
    assert (reply.status_code, reply.json()) == (recorded["status"], recorded["body"])
    assert reply.headers["content-type"] == recorded["headers"]["Content-Type"]


@pytest.mark.parametrize("name", ["ckpt_missing", "loadimage_missing"])
def test_missing_files_get_the_recorded_errors(node: ComfyNode, http: httpx.Client, name: str) -> None:
    recorded = sample(f"err_{name}")
    reply = http.post(f"{node.url}/api/prompt", json=recorded["request"]["json"])
    assert (reply.status_code, reply.json()) == (recorded["status"], recorded["body"])


def test_what_is_no_json_is_a_500(node: ComfyNode, http: httpx.Client) -> None:
    recorded = sample("err_not_json")
    reply = http.post(f"{node.url}/prompt", content=b"{")
    assert (reply.status_code, reply.text) == (500, recorded["body"]["__text__"])


def test_a_chain_its_history_its_file_and_its_cached_run(node: ComfyNode, http: httpx.Client) -> None:
    recorded = sample("chain_post_prompt")
    with _open(node, recorded["request"]["json"]["client_id"]) as socket:
        reply = http.post(f"{node.url}/prompt", json=recorded["request"]["json"])
        assert _plain(reply.json()) == _plain(recorded["body"])
        assert [_shape(frame) for frame in _until_over(socket)] == _recorded("chain_ws")
    history = http.get(f"{node.url}/history/{reply.json()['prompt_id']}").json()
    wanted = sample("history_one")["body"]
    [entry], [wanted_entry] = history.values(), wanted.values()
    assert _plain({**entry, "prompt": entry["prompt"][2:]}) == _plain(
        {**wanted_entry, "prompt": wanted_entry["prompt"][2:]}
    )
    view = sample("view_headers")
    picture = http.get(f"{node.url}/view", params=view["request"]["params"])
    for name in ("Content-Disposition", "Content-Type"):
        assert picture.headers[name] == view["headers"][name]
    cached = sample("chain_cached_post_prompt")["request"]["json"]
    with _open(node, cached["client_id"]) as socket:
        http.post(f"{node.url}/prompt", json=cached)
        assert [_shape(frame) for frame in _until_over(socket)] == _recorded("chain_cached_ws")


@pytest.mark.parametrize(("name", "metadata"), [("progress", False), ("progress_meta_preview", True), ("error", False)])
def test_progress_and_previews_in_both_framings(node: ComfyNode, http: httpx.Client, name: str, metadata: bool) -> None:
    [recorded] = sample(f"{name}_history").values()
    if metadata:
        # The recorded one had saved another before it.
        node.app.files.data["output", "comfyui", "fleet_00001_.png"] = b""
    with _open(node, "me", metadata=metadata) as socket:
        if metadata:
            first = [_shape(json.loads(socket.recv(timeout=60))) for _ in range(2)]
            assert first == _recorded(f"{name}_ws")[:2]
        body = {"prompt": recorded["prompt"][2], "client_id": "me"}
        prompt_id = http.post(f"{node.url}/prompt", json=body).json()["prompt_id"]
        frames = [_shape(frame) for frame in _until_over(socket)]
    assert frames == _recorded(f"{name}_ws")[2 if metadata else 0 :]
    [entry] = http.get(f"{node.url}/history/{prompt_id}").json().values()
    assert _plain(entry["outputs"]) == _plain(recorded["outputs"])
    assert _plain(entry["status"]) == _plain(recorded["status"])


def test_an_interrupt_is_of_the_prompt_that_it_names(node: ComfyNode, http: httpx.Client) -> None:
    [recorded] = sample("interrupt_mid_history").values()
    node.script.hold_at = 2
    with _open(node, "me") as socket:
        body = {"prompt": recorded["prompt"][2], "client_id": "me", "prompt_id": "mine"}
        assert http.post(f"{node.url}/prompt", json=body).json()["prompt_id"] == "mine"
        assert node.script.held.wait(50)
        assert http.post(f"{node.url}/interrupt", json={"prompt_id": "another's"}).content == b""
        assert http.get(f"{node.url}/queue").json()["queue_running"][0][1] == "mine"
        assert http.get(f"{node.url}/history/mine").json() == {}
        http.post(f"{node.url}/interrupt", json={"prompt_id": "mine"})
        assert [_shape(frame) for frame in _until_over(socket)] == _recorded("interrupt_mid_ws")
    [entry] = http.get(f"{node.url}/history/mine").json().values()
    assert _plain(entry["status"]) == _plain(recorded["status"])


def test_a_pending_prompt_that_is_deleted_leaves_no_history(node: ComfyNode, http: httpx.Client) -> None:
    [recorded] = sample("progress_history").values()
    node.script.queue_held = True
    for prompt_id in ("first", "second"):
        http.post(f"{node.url}/prompt", json={"prompt": recorded["prompt"][2], "prompt_id": prompt_id})
    shown = http.get(f"{node.url}/queue").json()
    assert [item[1] for item in shown["queue_pending"]] == ["first", "second"]
    assert http.post(f"{node.url}/queue", json={"delete": ["second"]}).content == b""
    assert http.get(f"{node.url}/prompt").json() == {"exec_info": {"queue_remaining": 1}}
    assert http.get(f"{node.url}/history/second").json() == {}


def test_lists_and_files(node: ComfyNode, http: httpx.Client) -> None:
    for name in ("CheckpointLoaderSimple", "EmptyImage", "KSampler", "SaveImage"):
        recorded = sample(f"object_info_{name}")
        assert http.get(f"{node.url}/object_info/{name}").json() == recorded["body"]
    for name in ("object_info_missing", "models", "models_checkpoints", "embeddings", "features", "system_stats"):
        recorded = sample(name)
        assert http.get(node.url + recorded["request"]["path"]).json() == recorded["body"], name
    for name in ("view_missing", "view_traversal"):
        recorded = sample(name)
        reply = http.get(node.url + recorded["request"]["path"])
        assert (reply.status_code, reply.content) == (recorded["status"], b""), name
    uploads = [http.post(f"{node.url}/upload/image", files={"image": ("in.png", data)}) for data in (b"a", b"a", b"b")]
    assert uploads[0].json() == sample("upload_image")["body"]
    assert [reply.json()["name"] for reply in uploads] == ["in.png", "in.png", "in (1).png"]


def test_a_restart_forgets_and_a_cut_socket_does_not(node: ComfyNode, http: httpx.Client) -> None:
    [recorded] = sample("progress_history").values()
    node.script.hold_at = 2
    with _open(node, "me") as socket:
        http.post(f"{node.url}/prompt", json={"prompt": recorded["prompt"][2], "client_id": "me", "prompt_id": "mine"})
        assert node.script.held.wait(50)
        node.drop_sockets()
        with pytest.raises(Exception, match="1012"):
            while True:
                socket.recv(timeout=60)
    with _open(node, "me") as socket:
        socket.recv(timeout=60)
        assert json.loads(socket.recv(timeout=60)) == {"type": "executing", "data": {"node": "1"}}
        node.script.release()
        assert "executed" in [frame["type"] for frame in _until_over(socket) if isinstance(frame, dict)]
    port = node.port
    node.stop()
    node.start()
    assert node.port == port
    assert http.get(f"{node.url}/history").json() == {}
