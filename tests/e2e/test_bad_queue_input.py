"""Bad input of the queue's calls: files to start from, jobs to wait for, pauses and redrives."""

from __future__ import annotations

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
pytestmark = pytest.mark.usefixtures("nothing_stored")
JOB = {"job_type": "image_gen", "payload": {"prompt": "a"}}
NOBODY = "0198f2c4-7a1e-7c3b-9d52-3f0e8a6b1c2d"


@pytest.mark.parametrize(
    ("path", "change", "status", "reason", "field"),
    [
        (VISION, {"n": 0}, 400, "INVALID_FIELD", "n"),
        (VISION, {"n": 65}, 400, "INVALID_FIELD", "n"),
        (VISION, {"n": "2"}, 400, "INVALID_FIELD", "n"),
        (GENERATE, {"init_image": "output:none.png"}, 404, "INPUT_NOT_FOUND", "init_image"),
        (VISION, {"init_image": "input:x"}, 404, "INPUT_NOT_FOUND", "init_image"),
        (VISION, {"init_image": f"job:{NOBODY}"}, 400, "INVALID_FIELD", "init_image"),
        (VISION, {"init_image": "https://example.com/a.png"}, 400, "INVALID_FIELD", "init_image"),
        (VISION, {"init_image": "../../etc/passwd"}, 400, "INVALID_FIELD", "init_image"),
        (VISION, {"init_image": "output:../valkey"}, 400, "INVALID_FIELD", "init_image"),
        (VISION, {"mask_image": "output:none.png"}, 400, "INVALID_FIELD", "mask_image"),
        (VISION, {"strength": 0.5}, 400, "INVALID_FIELD", "strength"),
        (VISION, {"strength": 1.5}, 400, "INVALID_FIELD", "strength"),
        (QUEUE, {"after": [NOBODY]}, 404, "JOB_NOT_FOUND", "after[0]"),
        (QUEUE, {"after": ["x" * 128]}, 404, "JOB_NOT_FOUND", "after[0]"),
        (QUEUE, {"after": ["a b"]}, 404, "JOB_NOT_FOUND", "after[0]"),
        (QUEUE, {"after": [""]}, 400, "INVALID_FIELD", "after[0]"),
        (QUEUE, {"after": ["x" * 129]}, 400, "INVALID_FIELD", "after[0]"),
        (QUEUE, {"after": [NOBODY] * 65}, 400, "INVALID_FIELD", "after"),
        (QUEUE, {"after": NOBODY}, 400, "INVALID_FIELD", "after"),
        (QUEUE, {"after": [None]}, 400, "INVALID_FIELD", "after[0]"),
        (QUEUE, {"exclusive": "yes"}, 400, "INVALID_FIELD", "exclusive"),
        (QUEUE, {"payload": {"prompt": "a", "n": 65}}, 400, "INVALID_FIELD", "payload.n"),
        (QUEUE, {"payload": {"prompt": "a", "init_image": "job:a"}}, 400, "INVALID_FIELD", "payload.init_image"),
    ],
)
def test_pictures_to_start_from_and_jobs_to_wait_for(
    quiet: httpx.Client, path: str, change: dict[str, Any], status: int, reason: str, field: str
) -> None:
    body = JOB if path == QUEUE else {"prompt": "a"}
    refused(quiet.post(path, json={**body, **change}), status, reason, field)
    if path == QUEUE:
        batch = {"jobs": [JOB, {**body, **change}]}
        refused(quiet.post(BATCH, json=batch), status, reason, f"jobs[1].{field}")


@pytest.mark.parametrize(
    ("path", "body", "status", "reason", "field"),
    [
        ("pause", {"target_cluster": 7}, 400, "INVALID_FIELD", "target_cluster"),
        ("pause", {"job_type": "magic"}, 400, "INVALID_FIELD", "job_type"),
        ("pause", {"priority": "urgent"}, 400, "INVALID_FIELD", "priority"),
        ("pause", {"cluster": "vision"}, 400, "UNKNOWN_FIELD", "cluster"),
        ("resume", {"priority": 1.5}, 400, "INVALID_FIELD", "priority"),
        ("resume", {"priority": "high"}, 404, "PAUSE_NOT_FOUND", None),
        ("resume", None, 404, "PAUSE_NOT_FOUND", None),
        ("dead/redrive", {}, 400, "INVALID_FIELD", "job_ids"),
        ("dead/redrive", {"limit": 5}, 400, "INVALID_FIELD", "job_ids"),
        ("dead/redrive", {"job_ids": []}, 400, "INVALID_FIELD", "job_ids"),
        ("dead/redrive", {"job_ids": ["a"] * 1001}, 400, "INVALID_FIELD", "job_ids"),
        ("dead/redrive", {"job_ids": "a"}, 400, "INVALID_FIELD", "job_ids"),
        ("dead/redrive", {"job_ids": ["a"], "limit": 0}, 400, "INVALID_FIELD", "limit"),
        ("dead/redrive", {"job_ids": ["a"], "limit": 1001}, 400, "INVALID_FIELD", "limit"),
        ("dead/redrive", {"job_ids": ["a"], "request_id": "two words"}, 400, "INVALID_FIELD", "request_id"),
        ("dead/redrive", {"ids": ["a"]}, 400, "UNKNOWN_FIELD", "ids"),
    ],
)
def test_pauses_and_redrives(
    quiet: httpx.Client, path: str, body: dict[str, Any] | None, status: int, reason: str, field: str | None
) -> None:
    refused(quiet.post(f"/api/queue/{path}", json=body), status, reason, field)


def test_redriving_what_is_not_there_is_told_and_harms_nothing(quiet: httpx.Client) -> None:
    reply = quiet.post("/api/queue/dead/redrive", json={"job_ids": ["nobody", "a}b", "x" * 500]}).json()
    assert (reply["redriven"], reply["remaining"]) == (0, 0)
    assert [failure["reason"] for failure in reply["failures"]] == ["JOB_NOT_FOUND"] * 3
