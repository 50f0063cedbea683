"""What stands behind the engines `sdxl_trt` and `openai`, held at a point of a request that a test names.

Both speak as their public interfaces say, in the few words that a fault needs: the real ones are in tests/worker and
tests/openai.
"""

from __future__ import annotations

import io
import json
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

BEFORE, MIDWAY, COMING = "before the first step", "mid-run", "while its result comes"
POINTS = (BEFORE, MIDWAY, COMING)
WORDS = ("one ", "two ", "three ", "four")


class HeldServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self._point = ""
        self._gone = False
        self.arrived = threading.Event()
        self._goes_on = threading.Event()

    def hold(self, point: str) -> None:
        """Holds the next request that comes to that point."""
        self.arrived.clear()
        self._goes_on.clear()
        self._gone = False
        self._point = point

    def release(self, *, gone: bool = False) -> None:
        """Goes on with what is held, or breaks its connection as a process that dies does."""
        self._point, self._gone = "", gone
        self._goes_on.set()

    def passes(self, point: str, connection: socket.socket) -> None:
        """A request has come to that point."""
        if point != self._point:
            return
        self._point = ""
        self.arrived.set()
        self._goes_on.wait(150)
        if self._gone:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            raise ConnectionAbortedError

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A broken connection is what tests ask for."""


class _Handler(BaseHTTPRequestHandler):
    server: HeldServer

    def do_GET(self) -> None:
        models = {"object": "list", "data": [{"id": "words", "object": "model"}]}
        self._head("application/json", json.dumps({"status": "ok"} if self.path == "/health" else models).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.passes(BEFORE, self.connection)
        if self.path.endswith("/chat/completions"):
            self._write()
        else:
            self._paint(body)

    def _paint(self, body: dict[str, Any]) -> None:
        self.server.passes(MIDWAY, self.connection)
        out = io.BytesIO()
        Image.effect_noise((body["width"], body["height"]), 64).save(out, "PNG")
        png = out.getvalue()
        self._head("image/png", png[: len(png) // 2], length=len(png))
        self.server.passes(COMING, self.connection)
        self.wfile.write(png[len(png) // 2 :])

    def _write(self) -> None:
        self._head("text/event-stream", b"", length=None)
        for number, word in enumerate(WORDS):
            if number == len(WORDS) // 2:
                self.server.passes(MIDWAY, self.connection)
            self._event({"choices": [{"index": 0, "delta": {"content": word}, "finish_reason": None}]})
        self.server.passes(COMING, self.connection)
        self._event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        usage = {"prompt_tokens": 1, "completion_tokens": len(WORDS), "total_tokens": len(WORDS) + 1}
        self._event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, value: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(value).encode() + b"\n\n")
        self.wfile.flush()

    def _head(self, kind: str, body: bytes, *, length: int | None = -1) -> None:
        """Status, headers and the first of the body; a length of None: until the connection ends."""
        self.send_response(200)
        self.send_header("Content-Type", kind)
        if length is not None:
            self.send_header("Content-Length", str(len(body) if length < 0 else length))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def log_message(self, *words: object) -> None:
        """Nothing of it is of use."""
