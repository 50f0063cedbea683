"""What both clients send and how they read it; no I/O here."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from PIL import Image

DEFAULT_URL = "http://localhost:8765"
GENERATE_SECONDS = 310.0
Json = dict[str, Any]


def base_url(given: str | None) -> str:
    """The server's address: as given, else FLEET_URL, else this machine."""
    return (given or os.environ.get("FLEET_URL") or DEFAULT_URL).rstrip("/")


def headers(api_key: str | None) -> dict[str, str]:
    """Headers of every call; the key as given, else FLEET_API_KEY."""
    key = api_key or os.environ.get("FLEET_API_KEY")
    return {"X-API-Key": key} if key else {}


def given(fields: Mapping[str, Any]) -> Json:
    """The fields that are not None: the server fills in the others."""
    return {name: value for name, value in fields.items() if value is not None}


def image_fields(prompt: str, options: Mapping[str, Any]) -> Json:
    """Body of a generate call. Documented: negative_prompt, width, height, steps, guidance_scale, seed; any other
    image field of the API goes along. A seed beyond 2^53 is sent as a string, as JSON wants it."""
    body = given({"prompt": prompt, **options})
    if isinstance(body.get("seed"), int) and body["seed"] > 1 << 53:
        body["seed"] = str(body["seed"])
    return body


def job_body(prompt: str, priority: str, callback_url: str | None, options: Mapping[str, Any]) -> Json:
    """Body of a queue call for a picture; options that are fields of the job are put beside the payload."""
    outer = {name: value for name, value in options.items() if name in JOB_FIELDS}
    inner = {name: value for name, value in options.items() if name not in JOB_FIELDS}
    return {
        "job_type": "image_gen",
        "priority": priority,
        "payload": image_fields(prompt, inner),
        **given({"callback_url": callback_url, **outer}),
    }


JOB_FIELDS = frozenset(
    {
        "target_cluster",
        "target_node_id",
        "target_labels",
        "max_retries",
        "timeout_seconds",
        "queue_ttl_seconds",
        "schedule_time",
        "after",
        "exclusive",
        "request_id",
    }
)


def segment(text: str) -> str:
    """Text as one segment of a path."""
    return quote(text, safe="")


def to_image(content: bytes, reply: Mapping[str, str]) -> Image.Image:
    """The picture, loaded; what the server said of it is in `info` (seed, filename, job_id)."""
    image = Image.open(io.BytesIO(content))
    image.load()
    for name in ("seed", "filename", "job-id", "resolved-model"):
        value = reply.get(f"x-{name}")
        if value is not None:
            image.info[name.replace("-", "_")] = int(value) if name == "seed" else value
    return image
