"""An SDXL-TRT worker in 40 lines, from the API reference alone: POST /api/fleet/generate and GET /health."""

import io
import json
import random
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image

DEFAULTS = {"negative_prompt": "blurry, bad quality", "width": 1024, "height": 1024, "steps": 20, "guidance_scale": 7.5}


class PlainWorker(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[dict[str, object]] = []
        self.healthy = True
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: PlainWorker

    def do_GET(self) -> None:
        self.answer(200 if self.path == "/health" and self.server.healthy else 503, b'{"status": "ok"}')

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/api/fleet/generate" or "prompt" not in body:
            return self.answer(404 if "prompt" in body else 400, b'{"detail": "prompt is required"}')
        job = {**DEFAULTS, **body}
        self.server.requests.append(job)
        seed = random.randrange(2**32) if job.get("seed") is None else job["seed"]
        out = io.BytesIO()
        Image.new("RGB", (job["width"], job["height"]), (seed % 256, 0, 0)).save(out, "PNG")
        return self.answer(200, out.getvalue(), {"X-Seed": str(seed), "X-Filename": f"{seed}.png"})

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        kind = "image/png" if body.startswith(b"\x89PNG") else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words: object) -> None:
        return None
