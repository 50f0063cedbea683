"""What a container prints, as it prints it: lines that are not ended, such as bars of progress, as well."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx

from fleet_agent.engines.base import EngineError, Reporter

_STEP_SECONDS = 0.1
_LOOK_SECONDS = 0.3
_WAITING = 256
_HEAD = 8


class ContainerOutput:
    """`with ContainerOutput(...) as output:`, then `pieces`. `runs` says whether the container still does.

    A thread listens, so that the engine can hear its slot meanwhile. Raises EngineError where it cannot be attached.
    """

    def __init__(self, url: str, name: str, runs: Callable[[], bool]) -> None:
        scheme, _, rest = url.partition("://")
        unix = scheme in ("unix", "http+unix")
        # Nothing here speaks TLS: the authorities of the world are not read for each container.
        transport = httpx.HTTPTransport(uds=f"/{rest.lstrip('/')}" if unix else None, verify=False)
        base = "http://docker" if unix else f"http://{rest}"
        # It may print nothing for hours.
        self._http = httpx.Client(transport=transport, base_url=base, timeout=httpx.Timeout(60, read=None))
        self._path = f"/containers/{name}/attach"
        self._runs = runs
        self._heard: queue.Queue[bytes | None] = queue.Queue(_WAITING)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True, name="container output")
        self._reply: Any = None

    def __enter__(self) -> ContainerOutput:
        wanted = {"stdout": "1", "stderr": "1", "stream": "1", "logs": "1"}
        try:
            self._reply = self._http.send(self._http.build_request("POST", self._path, params=wanted), stream=True)
            if not self._reply.is_success:
                words = self._reply.read().decode(errors="replace")[:300]
                raise EngineError("ENGINE_FAILED", f"the container's output cannot be had: {words}", retryable=True)
        except httpx.HTTPError as error:
            self._http.close()
            words = f"the Docker engine does not answer: {error}"
            raise EngineError("DOCKER_UNAVAILABLE", words, retryable=True) from error
        except BaseException:
            self._http.close()
            raise
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        stream = self._reply.extensions["network_stream"].get_extra_info("socket")
        with contextlib.suppress(OSError):
            stream.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._reply.close()
        self._http.close()

    def pieces(self, report: Reporter) -> Iterator[bytes | None]:
        """To the container's end, then None. `Cancelled` passes."""
        look_at = time.monotonic() + _LOOK_SECONDS
        while True:
            report.check()
            try:
                data = self._heard.get(timeout=_STEP_SECONDS)
            except queue.Empty:
                if time.monotonic() < look_at:
                    continue
                look_at = time.monotonic() + _LOOK_SECONDS
                # The engine does not end the stream of a container that was over before it began.
                data = b"" if self._runs() else None
            yield data
            if data is None:
                return

    def _listen(self) -> None:
        waiting = bytearray()
        with contextlib.suppress(httpx.HTTPError, httpx.StreamError, OSError):
            for chunk in self._reply.iter_raw():
                waiting += chunk
                # Each piece has a head: the stream, three bytes of nothing, its length.
                while len(waiting) >= _HEAD:
                    end = _HEAD + int.from_bytes(waiting[4:_HEAD], "big")
                    if len(waiting) < end:
                        break
                    self._say(bytes(waiting[_HEAD:end]))
                    del waiting[:end]
        self._say(None)

    def _say(self, data: bytes | None) -> None:
        while not self._over.is_set():
            try:
                self._heard.put(data, timeout=_STEP_SECONDS)
                return
            except queue.Full:
                continue
