"""Bad input, class by class: the status, a detail that names the field, and nothing stored."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.e2e.refusals import refused

GENERATE, VISION, QUEUE, BATCH = (
    "/api/fleet/generate",
    "/api/vision/generate",
    "/api/queue/jobs",
    "/api/queue/jobs/batch",
)
LONG = "x" * 10_001
pytestmark = pytest.mark.usefixtures("nothing_stored")


def raw(quiet: httpx.Client, path: str, body: bytes, content_type: str = "application/json") -> httpx.Response:
    return quiet.post(path, content=body, headers={"content-type": content_type})


IMAGE_FIELDS = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": " \t\n"}, "prompt"),
    ({"prompt": LONG}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({}, "prompt"),
    ({"prompt": 7}, "prompt"),
    ({"prompt": ["a"]}, "prompt"),
    ({"prompt": "a", "negative_prompt": LONG}, "negative_prompt"),
    ({"prompt": "a", "width": 1001}, "width"),
    ({"prompt": "a", "width": 56}, "width"),
    ({"prompt": "a", "height": 2056}, "height"),
    ({"prompt": "a", "width": "1024"}, "width"),
    ({"prompt": "a", "width": 1024.5}, "width"),
    ({"prompt": "a", "width": True}, "width"),
    ({"prompt": "a", "width": 0}, "width"),
    ({"prompt": "a", "width": 2**31}, "width"),
    ({"prompt": "a", "steps": 0}, "steps"),
    ({"prompt": "a", "steps": 151}, "steps"),
    ({"prompt": "a", "steps": -1}, "steps"),
    ({"prompt": "a", "guidance_scale": -0.1}, "guidance_scale"),
    ({"prompt": "a", "guidance_scale": 50.1}, "guidance_scale"),
    ({"prompt": "a", "guidance_scale": "7.5"}, "guidance_scale"),
    ({"prompt": "a", "seed": -1}, "seed"),
    ({"prompt": "a", "seed": 2**64}, "seed"),
    ({"prompt": "a", "seed": "seven"}, "seed"),
    ({"prompt": "a", "loras": [{"name": "x", "weight": 3}]}, "loras[0].weight"),
    ({"prompt": "a", "loras": [{"weight": 1}]}, "loras[0].name"),
    ({"prompt": "a", "loras": [None]}, "loras[0]"),
    ({"prompt": "a", "loras": {"name": "x"}}, "loras"),
    ({"prompt": "a", "loras": [{"name": f"l{n}"} for n in range(9)]}, "loras"),
]


@pytest.mark.parametrize("path", [GENERATE, VISION])
@pytest.mark.parametrize(("body", "field"), IMAGE_FIELDS, ids=[f"{f}-{n}" for n, (_, f) in enumerate(IMAGE_FIELDS)])
def test_image_fields(quiet: httpx.Client, path: str, body: dict[str, Any], field: str) -> None:
    found = refused(quiet.post(path, json=body), 400, "INVALID_FIELD", field)
    assert found["violations"][0]["field"] == field


@pytest.mark.parametrize(("body", "field"), IMAGE_FIELDS, ids=[f"{f}-{n}" for n, (_, f) in enumerate(IMAGE_FIELDS)])
def test_image_fields_of_a_queued_job(quiet: httpx.Client, body: dict[str, Any], field: str) -> None:
    job = {"job_type": "image_gen", "payload": body}
    refused(quiet.post(QUEUE, json=job), 400, "INVALID_FIELD", f"payload.{field}")
    good = {"job_type": "image_gen", "payload": {"prompt": "a"}}
    batch = {"jobs": [good, job, good]}
    refused(quiet.post(BATCH, json=batch), 400, "INVALID_FIELD", f"jobs[1].payload.{field}")


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        (GENERATE, {"prompt": "a", "widht": 64}, "widht"),
        (GENERATE, {"prompt": "a", "n": 2}, "n"),
        (VISION, {"prompt": "a", "callback_url": "http://example.com"}, "callback_url"),
        (QUEUE, {"job_type": "image_gen", "payload": {"prompt": "a"}, "prioritty": "high"}, "prioritty"),
        (QUEUE, {"job_type": "image_gen", "payload": {"prompt": "a", "stepz": 3}}, "payload.stepz"),
        (BATCH, {"jobs": [{"job_type": "image_gen", "payload": {"prompt": "a", "stepz": 3}}]}, "jobs[0].payload.stepz"),
    ],
)
def test_unknown_fields(quiet: httpx.Client, path: str, body: dict[str, Any], field: str) -> None:
    refused(quiet.post(path, json=body), 400, "UNKNOWN_FIELD", field)


@pytest.mark.parametrize("path", [GENERATE, VISION, QUEUE, BATCH])
@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"",
        b"[]",
        b'"text"',
        b"null",
        b'{"prompt": NaN}',
        b'{"prompt": "a", "guidance_scale": Infinity}',
        b'{"prompt": "a", "prompt": "b"}',
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a\\u0000b"}',
        b'{"a":' * 70 + b"1" + b"}" * 70,
        b'{"prompt": "a"} trailing',
    ],
)
def test_bodies_that_are_no_good_json(quiet: httpx.Client, path: str, body: bytes) -> None:
    response = raw(quiet, path, body)
    assert response.status_code == 400, response.text
    assert response.json()["reason"] in ("MALFORMED_JSON", "INVALID_FIELD", "UNKNOWN_FIELD")
    assert response.json()["detail"]


def test_sizes_and_media_types(quiet: httpx.Client) -> None:
    big = json.dumps({"prompt": "x" * (1 << 20)}).encode()
    refused(raw(quiet, GENERATE, big), 413, "BODY_TOO_LARGE")
    refused(raw(quiet, GENERATE, b'{"prompt": "a"}', "text/plain"), 415, "UNSUPPORTED_MEDIA_TYPE")
    refused(raw(quiet, QUEUE, b"prompt=a", "application/x-www-form-urlencoded"), 415, "UNSUPPORTED_MEDIA_TYPE")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"job_type": "magic"}, "job_type"),
        ({"job_type": None}, "job_type"),
        ({"job_type": 77}, "job_type"),
        ({"priority": "urgent"}, "priority"),
        ({"priority": 0}, "priority"),
        ({"payload": None}, "payload"),
        ({"payload": "x"}, "payload"),
        ({"target_cluster": "No Good"}, "target_cluster"),
        ({"target_node_id": "a b"}, "target_node_id"),
        ({"max_retries": -1}, "max_retries"),
        ({"max_retries": 21}, "max_retries"),
        ({"timeout_seconds": 0}, "timeout_seconds"),
        ({"timeout_seconds": 86_401}, "timeout_seconds"),
        ({"queue_ttl_seconds": 0}, "queue_ttl_seconds"),
        ({"queue_ttl_seconds": 2_592_001}, "queue_ttl_seconds"),
        ({"schedule_time": "tomorrow"}, "schedule_time"),
        ({"schedule_time": "2100-01-01T00:00:00Z"}, "schedule_time"),
        ({"callback_url": "ftp://example.com/x"}, "callback_url"),
        ({"callback_url": "example.com"}, "callback_url"),
        ({"callback_url": "http://user:secret@example.com/"}, "callback_url"),
        ({"callback_url": "http://" + "x" * 2048}, "callback_url"),
        ({"request_id": "two words"}, "request_id"),
        ({"request_id": ""}, "request_id"),
    ],
)
def test_job_fields(quiet: httpx.Client, change: dict[str, Any], field: str) -> None:
    job = {"job_type": "image_gen", "payload": {"prompt": "a"}, **change}
    body = refused(quiet.post(QUEUE, json=job), 400, "INVALID_FIELD", field)
    assert "secret" not in json.dumps(body)


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest/meta-data",
        "http://[fe80::1]/",
        "http://[::ffff:169.254.169.254]/",
        "http://10.0.0.8/hook",
        "http://[::ffff:10.0.0.8]/hook",
        "http://192.168.1.5:8080/hook",
        "http://0.0.0.0/",
    ],
)
def test_forbidden_callbacks(quiet: httpx.Client, url: str) -> None:
    job = {"job_type": "image_gen", "payload": {"prompt": "a"}, "callback_url": url}
    refused(quiet.post(QUEUE, json=job), 400, "CALLBACK_FORBIDDEN", "callback_url")


@pytest.mark.parametrize(
    ("payload", "field"),
    [
        ({"workflow": {}}, "payload.workflow"),
        ({"workflow": {"1": {}}}, "payload.workflow"),
        ({"workflow": {"1": {"class_type": "A", "inputs": 7}}}, "payload.workflow"),
        ({"workflow": "{}"}, "payload.workflow"),
        ({"workflow": {"1": {"class_type": "A"}}, "steps": 4}, "payload.steps"),
    ],
)
def test_workflows_that_are_none(quiet: httpx.Client, payload: dict[str, Any], field: str) -> None:
    refused(quiet.post(QUEUE, json={"job_type": "image_gen", "payload": payload}), 400, "INVALID_FIELD", field)


def test_a_workflow_is_given_once_and_for_pictures_alone(quiet: httpx.Client) -> None:
    workflow = {"1": {"class_type": "A", "inputs": {}}}
    twice = {"job_type": "image_gen", "payload": {"workflow": workflow}, "workflow_json": "{}"}
    refused(quiet.post(QUEUE, json=twice), 400, "INVALID_FIELD", "workflow_json")
    other = {"job_type": "training", "payload": {"workflow": workflow}}
    refused(quiet.post(QUEUE, json=other), 400, "INVALID_FIELD", "payload.workflow")


def test_unknown_names(quiet: httpx.Client) -> None:
    refused(quiet.post(GENERATE, json={"prompt": "a", "model": "none.safetensors"}), 404, "MODEL_NOT_FOUND", "model")
    refused(quiet.post(VISION, json={"prompt": "a", "model": "none.safetensors"}), 404, "MODEL_NOT_FOUND", "model")
    lora = {"prompt": "a", "loras": [{"name": "none.safetensors"}]}
    refused(quiet.post(VISION, json=lora), 404, "LORA_NOT_FOUND", "loras[0].name")
    for path in ("/api/queue/jobs/none", "/api/vision/jobs/none", "/api/queue/jobs/none/events"):
        refused(quiet.get(path), 404, "JOB_NOT_FOUND")
    refused(quiet.delete("/api/queue/jobs/none"), 404, "JOB_NOT_FOUND")
    refused(quiet.post("/api/queue/jobs/none/retry"), 404, "JOB_NOT_FOUND")
    refused(quiet.get("/api/nodes/none"), 404, "NODE_NOT_FOUND")
    job = {"job_type": "image_gen", "payload": {"prompt": "a"}, "target_node_id": "none"}
    refused(quiet.post(QUEUE, json=job), 404, "NODE_NOT_FOUND", "target_node_id")


def test_batches(quiet: httpx.Client) -> None:
    job = {"job_type": "image_gen", "payload": {"prompt": "a"}}
    refused(quiet.post(BATCH, json={"jobs": []}), 400, "INVALID_FIELD", "jobs")
    refused(quiet.post(BATCH, json={"jobs": [job] * 1001}), 400, "INVALID_FIELD", "jobs")
    refused(
        quiet.post(BATCH, json={"jobs": [job, {**job, "request_id": "x"}]}), 400, "INVALID_FIELD", "jobs[1].request_id"
    )
    unknown = {**job, "payload": {"prompt": "a", "model": "none"}}
    refused(quiet.post(BATCH, json={"jobs": [job, unknown]}), 404, "MODEL_NOT_FOUND", "jobs[1].payload.model")


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/api/queue/jobs?limit=0", "limit"),
        ("/api/queue/jobs?limit=1001", "limit"),
        ("/api/queue/jobs?limit=ten", "limit"),
        ("/api/queue/jobs?limit=1&limit=2", "limit"),
        ("/api/queue/jobs?status=lost", "status"),
        ("/api/queue/jobs?job_type=magic", "job_type"),
        ("/api/queue/jobs?created_after=yesterday", "created_after"),
        ("/api/queue/dead?limit=0", "limit"),
        ("/api/queue/dead?limit=1001", "limit"),
        ("/api/queue/dead?job_type=magic", "job_type"),
        ("/api/vision/gallery?limit=-5", "limit"),
        ("/api/vision/gallery?starred=maybe", "starred"),
        ("/api/nodes?status=lost", "status"),
    ],
)
def test_query_parameters(quiet: httpx.Client, path: str, field: str) -> None:
    body = refused(quiet.get(path), 400, "INVALID_FIELD")
    assert body["detail"].startswith(field)


def test_unknown_query_parameters_and_bodies_where_none_belong(quiet: httpx.Client) -> None:
    refused(quiet.get("/api/fleet/connect?api_key=x"), 400, "UNKNOWN_FIELD", "api_key")
    refused(quiet.get("/api/queue/jobs?dryrun=true"), 400, "UNKNOWN_FIELD", "dryrun")
    refused(quiet.post(GENERATE + "?prompt=a", json={"prompt": "a"}), 400, "UNKNOWN_FIELD", "prompt")
    refused(quiet.post("/api/outputs/sync", json={"x": 1}), 400, "UNKNOWN_FIELD")
    refused(quiet.get("/api/queue/jobs?page_token=nonsense"), 400, "INVALID_PAGE_TOKEN")
    refused(quiet.get("/api/queue/dead?page_token=nonsense"), 400, "INVALID_PAGE_TOKEN")
    refused(quiet.get("/api/queue/dead?owner=ann"), 400, "UNKNOWN_FIELD", "owner")


NAMES = [
    "..%2f..%2fetc%2fpasswd",
    "%2e%2e%2fvalkey",
    "..%5c..%5cx",
    "a%00b",
    "%2fetc%2fpasswd",
    ".hidden",
    "x" * 200,
    "no%20such.png",
    "missing.png",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["GET", "DELETE", "HEAD"])
def test_names_of_outputs(quiet: httpx.Client, method: str, name: str) -> None:
    response = quiet.request(method, f"/api/vision/outputs/{name}")
    assert response.status_code in (400, 404)
    if method != "HEAD":
        assert response.json()["reason"] in ("INVALID_PATH", "OUTPUT_NOT_FOUND")


def test_paths_and_methods(quiet: httpx.Client) -> None:
    refused(quiet.get("/api/nowhere"), 404, "ROUTE_NOT_FOUND")
    refused(quiet.get("/api/nodes/"), 404, "ROUTE_NOT_FOUND")
    wrong = quiet.put(GENERATE, json={"prompt": "a"})
    refused(wrong, 405, "METHOD_NOT_ALLOWED")
    assert wrong.headers["allow"] == "POST"


def test_hosts_and_origins(quiet: httpx.Client) -> None:
    refused(quiet.get("/api/nodes", headers={"host": "evil.example"}), 403, "HOST_FORBIDDEN")
    refused(quiet.get("/api/nodes", headers={"origin": "http://evil.example"}), 403, "ORIGIN_FORBIDDEN")
    refused(quiet.get("/api/nodes", headers={"origin": "null"}), 403, "ORIGIN_FORBIDDEN")
    assert quiet.get("/api/nodes", headers={"origin": "http://localhost:3000"}).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/api/fleet/deploy", {"node_id": "n1", "image": "i", "name": "web"}),
        ("GET", "/api/fleet/deploy/n1/c1", None),
        ("DELETE", "/api/fleet/deploy/n1/c1", None),
        ("POST", "/api/fleet/exec/n1", {"command": "nvidia-smi"}),
        ("GET", "/api/fleet/logs/n1/c1?tail=100", None),
        ("GET", "/api/fleet/logs/n1/c1/stream", None),
    ],
)
def test_nodes_that_are_not_there(quiet: httpx.Client, method: str, path: str, body: dict[str, Any] | None) -> None:
    found = refused(quiet.request(method, path, json=body), 404, "NODE_NOT_FOUND")
    assert "'n1'" in found["detail"] and "GET /api/nodes" in found["detail"]


def test_a_node_without_docker(quiet: httpx.Client) -> None:
    """What needs an engine says so; what does not, works."""
    (node,) = quiet.get("/api/nodes").json()["nodes"]
    body = {"node_id": node["node_id"], "image": "busybox", "name": "web"}
    found = refused(quiet.post("/api/fleet/deploy", json=body), 503, "DOCKER_UNAVAILABLE")
    assert "Docker" in found["detail"]
    refused(quiet.get(f"/api/fleet/logs/{node['node_id']}/web"), 503, "DOCKER_UNAVAILABLE")
    refused(quiet.delete(f"/api/fleet/deploy/{node['node_id']}/web"), 503, "DOCKER_UNAVAILABLE")
    listed = quiet.get("/api/fleet/deploy").json()
    assert listed == {"containers": [], "next_page_token": "", "unreachable_node_ids": []}
    done = quiet.post(f"/api/fleet/exec/{node['node_id']}", json={"command": "echo here"})
    assert (done.status_code, done.json()["stdout"]) == (200, "here\n")
    refused(quiet.get("/api/swarm/services"), 503, "NOT_SWARM_MANAGER")
