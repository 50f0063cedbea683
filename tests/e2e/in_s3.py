"""Whether the files of a job are in the fleet's S3."""

from __future__ import annotations

import hashlib
from typing import Any
from urllib.parse import urlsplit

import httpx

from tests.waiting import wait_until_now


def keys_in_s3(api: httpx.Client, outputs: list[dict[str, Any]]) -> list[str]:
    """Bucket and key of each, whose bytes there are those that the output says. The fleet has FLEET_S3_PORT=0."""
    assert api.post("/api/outputs/sync").json()["failed"] == 0
    keys = []
    for output in outputs:
        about = f"/api/vision/outputs/{output['filename']}/metadata"
        url: str = wait_until_now(lambda about=about: api.get(about).json()["s3_url"], seconds=100)  # type: ignore[misc]
        body = httpx.get(url, timeout=60, trust_env=False).raise_for_status().content
        assert (hashlib.sha256(body).hexdigest(), len(body)) == (output["sha256"], output["size_bytes"])
        keys.append(urlsplit(url).path.lstrip("/"))
    return keys
