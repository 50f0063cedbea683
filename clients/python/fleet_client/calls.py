"""What both clients send and how they read it; no I/O here."""

from __future__ import annotations

import io
import mimetypes
import os
import ssl
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

import httpx
from PIL import Image

from fleet_client.errors import SettingError

DEFAULT_URL = "http://localhost:8765"
CONNECT_SECONDS = 5.0
GENERATE_SECONDS = 310.0
"""The server gives up on a generate call after 300."""
MODEL_SECONDS = 3610.0
"""Loading and downloading models may take an hour."""
SILENCE_SECONDS = 45.0
"""A stream that is silent for so long is dead: the server sends a comment every 15."""
SAFE_INTEGER = 1 << 53
Json = dict[str, Any]


def base_url(given: str | None) -> str:
    """The server's address: as given, else FLEET_URL, else this machine. `gpu.lan:8765` is taken for http.
    Raises SettingError for what is no http(s) address."""
    text = (given or os.environ.get("FLEET_URL") or DEFAULT_URL).strip()
    address = text if "://" in text else f"http://{text}"
    try:
        url = httpx.URL(address)
    except httpx.InvalidURL as error:
        raise SettingError(f"url: {text!r} is no address: {error}") from None
    if url.scheme not in ("http", "https") or not url.host or " " in address:
        raise SettingError(f"url: {text!r} is no address; give one such as {DEFAULT_URL}")
    return address.rstrip("/")


def headers(api_key: str | None) -> dict[str, str]:
    """Headers of every call; the key as given, else FLEET_API_KEY. Raises SettingError for one that cannot be sent."""
    key = (api_key or os.environ.get("FLEET_API_KEY") or "").strip()
    if not key:
        return {}
    if not all(" " < letter <= "~" for letter in key):
        raise SettingError("api_key: must be visible ASCII characters without spaces")
    return {"X-API-Key": key}


def trust(base_url: str) -> ssl.SSLContext | bool:
    """Whom connections believe over TLS. Over plain HTTP nobody: to read all authorities takes longer than a call."""
    return True if base_url.lower().startswith("https:") else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def timeout(read_seconds: float) -> httpx.Timeout:
    """Waits so long for an answer, and never long for a connection."""
    return httpx.Timeout(read_seconds, connect=min(CONNECT_SECONDS, read_seconds))


def given(fields: Mapping[str, Any]) -> Json:
    """The fields that are not None: the server fills in the others."""
    return {name: value for name, value in fields.items() if value is not None}


def image_fields(prompt: str, options: Mapping[str, Any]) -> Json:
    """Body of a generate call. Documented: negative_prompt, width, height, steps, guidance_scale, seed; any other
    image field of the API goes along."""
    return _with_exact_seed(given({"prompt": prompt, **options}))


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


def exact(job: Mapping[str, Any]) -> Json:
    """A job as it is sent: without None, its seed as JSON can carry it."""
    body = given(job)
    if isinstance(body.get("payload"), Mapping):
        body["payload"] = _with_exact_seed(dict(body["payload"]))
    return body


def batch_body(jobs: Sequence[Mapping[str, Any]], request_id: str | None) -> Json:
    """Body of a batch call."""
    return given({"jobs": [exact(job) for job in jobs], "request_id": request_id})


def is_live(filters: Mapping[str, Any]) -> bool:
    """Whether a stream of events with these filters begins with what happens next, and not with something known."""
    return not {"since", "job_id", "node_id"} & set(filters)


def _with_exact_seed(fields: Json) -> Json:
    """JSON numbers hold integers up to 2^53; a larger seed is sent as a string."""
    seed = fields.get("seed")
    return {**fields, "seed": str(seed)} if isinstance(seed, int) and seed > SAFE_INTEGER else fields


def media_type(filename: str) -> str:
    """What a file of this name most likely is."""
    return mimetypes.guess_type(filename)[0] or "application/octet-stream"


def segment(text: str) -> str:
    """Text as one segment of a path."""
    return quote(text, safe="")


def to_image(content: bytes, reply: Mapping[str, str]) -> Image.Image:
    """The picture, loaded; what the server said of it is in `info` (seed, filename, job_id, resolved_model)."""
    image = Image.open(io.BytesIO(content))
    image.load()
    for name in ("seed", "filename", "job-id", "resolved-model"):
        value = reply.get(f"x-{name}")
        if value is not None:
            image.info[name.replace("-", "_")] = int(value) if name == "seed" else value
    return image
