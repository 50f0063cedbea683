"""A socket that leads to a Docker engine, and can be held at a request, or cut."""

from __future__ import annotations

import contextlib
import re
import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CREATE = re.compile(rb"POST \S+/containers/create")
START = re.compile(rb"POST \S+/containers/\S+/start ")
REMOVE = re.compile(rb"DELETE \S+/containers/")


class HeldEngine(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True

    def __init__(self, path: Path, target: Path) -> None:
        super().__init__(str(path), _Call)
        self.url = f"unix://{path}"
        self.target = str(target)
        self.arrived = threading.Event()
        self.lost = False
        """Whoever connects is turned away; see `lose`."""
        self._held: re.Pattern[bytes] | None = None
        self._given_up = threading.Event()
        self._lock = threading.Lock()
        self._ends: set[socket.socket] = set()

    def hold(self, request: re.Pattern[bytes] | None) -> None:
        """The next such request waits for `drop`; None: none does."""
        self.arrived.clear()
        self._given_up.clear()
        self._held = request

    def drop(self) -> None:
        """What is held is nobody's any more: it never reaches the engine."""
        self._given_up.set()

    def lose(self) -> None:
        """The engine is away: what is connected ends, and nobody gets through."""
        self.lost = True
        with self._lock:
            for end in self._ends:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def find(self) -> None:
        """It is back."""
        self.lost = False

    def passes(self, data: bytes) -> bool:
        """Whether what came may go on to the engine."""
        if self._held is None or not self._held.match(data):
            return True
        self._held = None
        self.arrived.set()
        self._given_up.wait(100)
        return False

    @contextmanager
    def connected(self, *ends: socket.socket) -> Iterator[bool]:
        """While the block runs, `lose` ends these. False: it has been called."""
        with self._lock:
            self._ends.update(ends)
        try:
            yield not self.lost
        finally:
            with self._lock:
                self._ends.difference_update(ends)


class _Call(socketserver.BaseRequestHandler):
    server: HeldEngine

    def handle(self) -> None:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as engine:
            engine.connect(self.server.target)
            with self.server.connected(self.request, engine) as there:
                if there:
                    self._pass_on(engine)

    def _pass_on(self, engine: socket.socket) -> None:
        back = threading.Thread(target=_pass, args=(engine, self.request), daemon=True)
        back.start()
        try:
            while (data := self.request.recv(65_536)) and self.server.passes(data):
                engine.sendall(data)
        finally:
            with contextlib.suppress(OSError):
                engine.shutdown(socket.SHUT_RDWR)
            back.join()


def _pass(engine: socket.socket, caller: socket.socket) -> None:
    """What the engine says, to its end."""
    with contextlib.suppress(OSError):
        while data := engine.recv(65_536):
            caller.sendall(data)
    with contextlib.suppress(OSError):
        caller.shutdown(socket.SHUT_RDWR)
