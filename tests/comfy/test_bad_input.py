"""Whatever is sent, the answer is ComfyUI's or ours, and the gateway goes on."""

from __future__ import annotations

import json
import uuid
from typing import Any

import pytest

from tests.comfy.house import House, progress

Json = Any
TAKEN = str(uuid.uuid4())


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        ({}, 400, "no_prompt"),
        ([], 400, "no_prompt"),
        ("text", 400, "no_prompt"),
        ({"prompt": None}, 400, "no_prompt"),
        ({"prompt": {}}, 400, "prompt_no_outputs"),
        ({"prompt": []}, 400, "invalid_prompt"),
        ({"prompt": {"1": None}}, 400, "invalid_prompt"),
        ({"prompt": {"1": {"class_type": 7, "inputs": {}}}}, 400, "invalid_prompt"),
        ({"prompt": {"1": {"inputs": {}}}}, 400, "invalid_prompt"),
        ({"prompt": {"1": {"class_type": "SaveImage", "inputs": []}}}, 400, "invalid_prompt"),
        ({"prompt": progress(), "number": "many"}, 400, "invalid_prompt"),
        ({"prompt": progress(), "number": {}}, 400, "invalid_prompt"),
    ],
)
def test_prompts_that_are_none(house: House, body: Json, status: int, kind: str) -> None:
    reply = house.post("/prompt", body)
    assert (reply.status_code, reply.json()["error"]["type"]) == (status, kind)
    assert reply.json()["node_errors"] == {}
    assert house.get("/prompt") == {"exec_info": {"queue_remaining": 0}}


@pytest.mark.parametrize("body", [b"\xff\xfe", b"{", b'{"prompt": NaN}', b'{"a": 1}trailing', b"[" * 100_000])
def test_bytes_that_are_no_json(house: House, body: bytes) -> None:
    assert house.http.post("/prompt", content=body).status_code == 500


def test_a_prompt_that_is_too_large(house: House) -> None:
    graph = progress()
    graph["1"]["_meta"] = {"title": "x" * (17 << 20)}
    reply = house.post("/prompt", {"prompt": graph})
    assert (reply.status_code, reply.json()["reason"]) == (413, "BODY_TOO_LARGE")


def test_ids_of_clients(house: House) -> None:
    own = str(uuid.uuid4())
    assert house.submit(progress(seed=1), prompt_id=own) == own
    again = house.post("/prompt", {"prompt": progress(seed=2), "prompt_id": own})
    assert (again.status_code, again.json()["error"]["type"]) == (400, "invalid_prompt_id")
    for other in ("mine", own.upper(), own.replace("-", ""), 7, "", "../x"):
        made = house.submit(progress(seed=3), prompt_id=other)
        assert made != other and str(uuid.UUID(made)) == made
    house.entry(own)
    assert house.post("/prompt", {"prompt": progress(seed=2), "prompt_id": own}).status_code == 400, (
        "also once it ended"
    )


def test_what_comes_with_a_prompt_is_kept_and_secrets_are_not_shown(house: House) -> None:
    extra = {
        "extra_pnginfo": {"workflow": {"id": "w1"}},
        "api_key_comfy_org": "hidden-1",
        "auth_token_comfy_org": "hidden-2",
    }
    prompt_id = house.submit(progress(seed=4), extra_data=extra, client_id="x")
    entry = house.entry(prompt_id)
    shown = dict(entry["prompt"][3])
    assert shown.pop("create_time") > 0
    assert shown == {"extra_pnginfo": {"workflow": {"id": "w1"}}, "client_id": "x"}
    assert [job["id"] for job in house.get("/api/jobs", workflow_id="w1")["jobs"]] == [prompt_id]
    assert "hidden" not in json.dumps(house.get(f"/api/jobs/{prompt_id}"))
    job = house.http.get(f"{house.server.url}/api/queue/jobs/{prompt_id}").text
    assert "hidden" not in job
    sent = next(c.body for c in house.nodes["n1"].called("POST", "/prompt") if c.body["prompt_id"] == prompt_id)
    assert sent["extra_data"]["api_key_comfy_org"] == "hidden-1", "the node needs it"
    assert "hidden" not in house.server.log.read_text()


def test_large_seeds_and_odd_values_stay_as_they_are(house: House) -> None:
    graph = progress(seed=2**64 - 1)
    graph["2"]["inputs"]["filename_prefix"] = "käse/日本"
    prompt_id = house.submit(graph)
    assert house.entry(prompt_id)["prompt"][2] == graph
    sent = next(c.body for c in house.nodes["n1"].called("POST", "/prompt") if c.body["prompt_id"] == prompt_id)
    assert sent["prompt"] == graph
    huge = progress(seed=2**64)
    refused = house.post("/prompt", {"prompt": huge}).json()["node_errors"]["1"]["errors"][0]
    assert refused["type"] == "value_bigger_than_max"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/queue", {"delete": "abc"}),
        ("/queue", {"delete": [None, {}, "x" * 5000, "../../x"]}),
        ("/queue", []),
        ("/history", {"delete": {"a": 1}, "clear": 0}),
        ("/interrupt", {"prompt_id": {"a": 1}}),
        ("/interrupt", {"prompt_id": "\0"}),
        ("/interrupt", []),
    ],
)
def test_odd_bodies_do_nothing(house: House, path: str, body: Json) -> None:
    reply = house.post(path, body)
    assert (reply.status_code, reply.content) == (200, b"")


def test_odd_questions(house: House) -> None:
    assert house.get("/history/no-such-id") == {} == house.get("/history/" + "x" * 4000)
    assert house.http.get("/history", params={"max_items": "many", "offset": "-3"}).status_code == 200
    assert house.http.get("/api/jobs", params={"limit": "0"}).status_code == 400
    assert house.http.get("/api/jobs/nope").status_code == 404
    assert house.http.post("/api/jobs/cancel", json={"job_ids": [1]}).status_code == 400
    assert house.http.post("/api/jobs/nope/cancel").json() == {"cancelled": False}
    assert house.http.get("/models/nope").status_code == 404
    for query in (
        "filename=",
        "filename=x%00y",
        "filename=/etc/passwd",
        "filename=..%2F..%2Fx",
        "filename=a&type=model",
    ):
        assert house.http.get(f"/view?{query}").status_code == 400, query
    assert house.http.get("/view").status_code == 404
    assert house.http.get("/view?filename=a.png&subfolder=../..").status_code == 403
    assert house.http.request("DELETE", "/queue").status_code in (404, 405)
    assert house.http.options("/prompt").status_code in (200, 405)
