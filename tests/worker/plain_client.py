"""A client of an SDXL-TRT worker in 40 lines, from the API reference alone."""

import json
import urllib.error
import urllib.request
from dataclasses import dataclass


@dataclass
class Answer:
    status: int
    body: bytes
    seed: str | None
    filename: str | None
    content_type: str | None

    @property
    def detail(self) -> str:
        return str(json.loads(self.body)["detail"])


def generate(url: str, **fields: object) -> Answer:
    """POST /api/fleet/generate with these fields."""
    request = urllib.request.Request(
        f"{url}/api/fleet/generate",
        data=json.dumps(fields).encode(),
        headers={"Content-Type": "application/json"},
        method="POST",
    )
    return _sent(request)


def health(url: str) -> Answer:
    """GET /health."""
    return _sent(urllib.request.Request(f"{url}/health"))


def _sent(request: urllib.request.Request) -> Answer:
    try:
        with urllib.request.urlopen(request, timeout=50) as reply:
            headers, status, body = reply.headers, reply.status, reply.read()
    except urllib.error.HTTPError as error:
        with error:
            headers, status, body = error.headers, error.code, error.read()
    return Answer(status, body, headers["X-Seed"], headers["X-Filename"], headers["Content-Type"])
