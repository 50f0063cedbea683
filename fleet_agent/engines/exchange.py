"""One HTTP request to a program of the node, which may take long to answer: cancelled within 100 ms at any point.

A thread talks and the engine listens, so that it can hear its slot meanwhile. Ending an exchange early cuts its
connection, which is how such programs are told to stop.
"""

from __future__ import annotations

import contextlib
import http.client
import queue
import socket
import threading
import time
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import httpx

from fleet_agent.engines.base import EngineError, Reporter

_STEP_SECONDS = 0.1
_WAITING_CHUNKS = 64
_CHUNK = 65_536
_CONNECT_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Ask:
    """A request. `name` is what the program is called in errors."""

    name: str
    method: str
    url: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | Iterable[bytes] | None = None
    silence_seconds: float = 600
    """So long it may say nothing."""

    @classmethod
    def made(cls, name: str, request: httpx.Request, silence_seconds: float) -> Ask:
        """Of a request as httpx writes it."""
        skipped = ("host", "connection", "accept-encoding")
        headers = {key: value for key, value in request.headers.items() if key not in skipped}
        assert isinstance(request.stream, Iterable)
        return cls(name, request.method, str(request.url), headers, request.stream, silence_seconds)


@dataclass(frozen=True, slots=True)
class Head:
    """Status and headers (in lower case) of a reply."""

    status: int
    headers: Mapping[str, str]


class Exchange:
    """`with Exchange(ask, report) as head:` sends it and waits for the head; then `chunks` or `body`."""

    def __init__(self, ask: Ask, report: Reporter) -> None:
        self._ask = ask
        self._report = report
        self._heard: queue.Queue[Head | bytes | BaseException | None] = queue.Queue(_WAITING_CHUNKS)
        self._over = threading.Event()
        url = urllib.parse.urlsplit(ask.url)
        kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
        self._target = urllib.parse.urlunsplit(("", "", url.path or "/", url.query, ""))
        self._connection = kind(url.hostname or "", url.port, timeout=_CONNECT_SECONDS, blocksize=_CHUNK)
        self._thread = threading.Thread(target=self._talk, daemon=True, name=f"ask {ask.name}")

    def __enter__(self) -> Head:
        """The head. Raises EngineError where none comes; `Cancelled` passes."""
        self._thread.start()
        try:
            head = self._next()
            assert isinstance(head, Head)
            return head
        except BaseException:
            self._cut()
            raise

    def __exit__(self, *exc: object) -> None:
        self._cut()

    def chunks(self) -> Iterator[bytes]:
        """The body as it comes. Raises EngineError where it is cut short; `Cancelled` passes."""
        while isinstance(chunk := self._next(), bytes):
            yield chunk

    def body(self, most: int) -> bytes:
        """The whole body. Raises EngineError where it is longer than that."""
        whole = bytearray()
        for chunk in self.chunks():
            whole += chunk
            if len(whole) > most:
                raise EngineError("ENGINE_FAILED", f"{self._ask.name} answers with more than {most:,} bytes")
        return bytes(whole)

    def _next(self) -> Head | bytes | None:
        until = time.monotonic() + self._ask.silence_seconds
        while True:
            self._report.check()
            try:
                heard = self._heard.get(timeout=_STEP_SECONDS)
            except queue.Empty:
                if time.monotonic() > until:
                    silence = f"said nothing for {self._ask.silence_seconds:g} s"
                    raise EngineError("ENGINE_FAILED", f"{self._ask.name} {silence}", retryable=True) from None
                continue
            if isinstance(heard, BaseException):
                why = str(heard) or type(heard).__name__
                words = f"{self._ask.name} at {self._ask.url} does not answer: {why}"
                raise EngineError("ENGINE_FAILED", words, retryable=True) from heard
            return heard

    def _cut(self) -> None:
        """Ends the connection, wherever the thread is with it."""
        self._over.set()
        sock = self._connection.sock
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._thread.join(_CONNECT_SECONDS)
        self._connection.close()

    # The thread.

    def _talk(self) -> None:
        try:
            self._connection.connect()
            if self._over.is_set():
                return
            # How long it may be silent, the other side judges.
            self._connection.sock.settimeout(None)
            self._connection.request(self._ask.method, self._target, self._ask.body, dict(self._ask.headers))
            reply = self._connection.getresponse()
            headers = {name.lower(): value for name, value in reply.getheaders()}
            self._say(Head(reply.status, headers))
            while not self._over.is_set() and (chunk := reply.read1(_CHUNK)):
                self._say(chunk)
            if reply.length:
                raise ConnectionError(f"its answer was cut short by {reply.length} bytes")
            self._say(None)
        except (OSError, http.client.HTTPException, ValueError) as error:
            self._say(error)
        finally:
            self._connection.close()

    def _say(self, heard: Head | bytes | BaseException | None) -> None:
        while not self._over.is_set():
            try:
                self._heard.put(heard, timeout=_STEP_SECONDS)
                return
            except queue.Full:
                continue
