"""The S3 server that `fleet up` runs: a child process on sockets that we have bound, kept alive."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from fleet_server.children import Child, Program

_ANSWER_SECONDS = 2.0


class EmbeddedS3:
    """An S3 server for the four buckets, with its data in `folder`, on listening `sockets`, which become its own.

    It holds `lock_fds` and dies with us. While it is down callers wait in the sockets' queues: a restart is a delay,
    not a refusal. Below `disk_floor_bytes` of free disk it takes no objects.
    """

    def __init__(
        self,
        folder: Path,
        sockets: Sequence[socket.socket],
        *,
        access_key: str,
        secret_key: str,
        region: str = "us-east-1",
        disk_floor_bytes: int = 0,
        lock_fds: Sequence[int] = (),
    ) -> None:
        self._folder = folder.absolute()
        self._sockets = tuple(sockets)
        fds = [listener.fileno() for listener in sockets]
        kept = {name: value for name, value in os.environ.items() if not name.startswith("FLEET_")}
        self._child = Child(
            Program(
                name="the embedded S3",
                command=(
                    sys.executable,
                    "-m",
                    "fleet_server.embedded.s3_server",
                    self._folder,
                    *(str(fd) for fd in fds),
                ),
                answers=self._answers,
                log=self._folder / "s3.log",
                log_stderr=True,
                pass_fds=(*fds, *lock_fds),
                # Keys go by the environment: the command line is anybody's to read.
                environment={
                    **kept,
                    "FLEET_S3_ACCESS_KEY": access_key,
                    "FLEET_S3_SECRET_KEY": secret_key,
                    "FLEET_S3_REGION": region,
                    "FLEET_DISK_FLOOR_BYTES": str(disk_floor_bytes),
                },
            )
        )

    @property
    def pid(self) -> int | None:
        """The server's process id, None while it is down."""
        return self._child.pid

    @property
    def restarts(self) -> int:
        """How often it was started again."""
        return self._child.restarts

    @property
    def port(self) -> int:
        """Where it listens."""
        port: int = self._sockets[0].getsockname()[1]
        return port

    async def start(self) -> None:
        """Starts the server; calls wait in its sockets until it is up. Raises OSError for a bad folder."""
        await asyncio.to_thread(self._folder.mkdir, mode=0o700, parents=True, exist_ok=True)
        await self._child.launch()

    async def stop(self) -> None:
        """Ends the server and closes the sockets."""
        await self._child.stop()
        for listener in self._sockets:
            listener.close()

    async def _answers(self) -> bool:
        """Whether it answers HTTP at all: an unsigned call is refused, which is answer enough."""
        host, port = self._sockets[0].getsockname()[:2]
        near = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(_ANSWER_SECONDS):
                reader, writer = await asyncio.open_connection(near, port)
                try:
                    writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                    return (await reader.read(5)) == b"HTTP/"
                finally:
                    writer.close()
        return False
