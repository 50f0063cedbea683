"""The embedded S3 for tests: its program, on a free port and a folder of the test's."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.ports import free_port

ACCESS = "minioadmin"
SECRET = "minioadmin123"


class EmbeddedProcess:
    """Can be stopped, killed and started again on the same port; callers are refused while it is down."""

    def __init__(self, folder: Path, *, port: int = 0, floor_bytes: int = 0) -> None:
        self._folder = folder
        self._floor = floor_bytes
        self._process: subprocess.Popen[bytes] | None = None
        self.port = port or free_port()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def running(self) -> bool:
        """Whether it was started and not stopped since."""
        return self._process is not None

    @property
    def log(self) -> Path:
        return self._folder.parent / f"{self._folder.name}.log"

    def start(self) -> Self:
        """Starts it; calls wait in its socket until it is up."""
        self._folder.mkdir(parents=True, exist_ok=True)
        environment = {
            **os.environ,
            "FLEET_S3_ACCESS_KEY": ACCESS,
            "FLEET_S3_SECRET_KEY": SECRET,
            "FLEET_DISK_FLOOR_BYTES": str(self._floor),
        }
        with self._bound(self.port) as listener, self.log.open("ab") as log:
            listener.listen(128)
            listener.setblocking(False)
            fd = listener.fileno()
            command = [sys.executable, "-m", "fleet_server.embedded.s3_server", str(self._folder), str(fd)]
            self._process = subprocess.Popen(command, pass_fds=[fd], env=environment, stderr=log)
        return self

    def stop(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Ends it."""
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(50)
            self._process = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @staticmethod
    def _bound(port: int) -> socket.socket:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        return listener
