"""The job that every peer answers with, and the request that creates it, as our JSON has them."""

from __future__ import annotations

from typing import Any

JOB_ID = "job-0123456789abcdef"
API_KEY = "bench-key-0123456789abcdef"

JOB: dict[str, Any] = {
    "job_id": JOB_ID,
    "tenant": "acme-research",
    "queue": "default-gpu",
    "kind": "image.generate",
    "state": "running",
    "priority": 5,
    "attempt": 1,
    "version": 1234567890123,
    "create_time": "2026-11-22T21:14:15.123456Z",
    "update_time": "2026-11-22T21:14:19.500Z",
    "resources": {
        "gpus": 1,
        "memory_bytes": 25769803776,
        "cpu": 4.5,
        "gpu_model": "H100",
        "features": ["fp8", "nvlink"],
    },
    "labels": {"team": "vision", "env": "prod", "experiment": "fox-12", "owner": "alice"},
    "payload": {
        "model": "sd-xl-base-1.0",
        "prompt": "a watercolor fox in a snowy forest, highly detailed, soft light",
        "steps": 30,
        "cfg": 7.5,
        "seed": 123456789,
        "size": {"w": 1024, "h": 1024},
        "loras": ["detail", "lighting"],
        "hires": True,
        "negative": None,
    },
    "worker_id": "node-eu-1a/agent-7",
    "progress": 0.4375,
    "cancel_requested": False,
    "artifacts": ["s3://bucket/a/0001.png", "s3://bucket/a/0002.png"],
}

CREATE: dict[str, Any] = {"parent": "t/acme", "job": JOB, "request_id": "r1"}
