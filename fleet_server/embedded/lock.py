"""The lock of a data folder: one server at a time, and no orphan of an earlier one beside it.

The lock is a flock on an open file that every child process inherits, so it is held as long as anything started from
the folder lives. A start that finds it held asks who: a living server is left alone and named, orphans are ended.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from fleet_server.disk import lasting_folder

_TERM_SECONDS = 5.0
_KILL_SECONDS = 5.0
_POLL_SECONDS = 0.02


class FolderInUseError(RuntimeError):
    """Another server runs on this folder."""


class FolderLock:
    """Holds `folder`/lock from `acquire` until `release`, or until the last child that inherited `fileno()` ends."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "lock"
        self._fd: int | None = None

    def fileno(self) -> int:
        """The descriptor for children to inherit."""
        if self._fd is None:
            raise ValueError("the lock is not held")
        return self._fd

    def acquire(self) -> None:
        """Takes the lock; ends orphans of a dead server first, for at most ten seconds.

        Blocking; call it before the event loop starts. Raises FolderInUseError where a living server holds it.
        """
        lasting_folder(self._path.parent, 0o700)
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if not _lock(fd):
                owner = _owner(fd)
                if owner is not None:
                    raise FolderInUseError(
                        f"{self._path.parent} is in use by the server with pid {owner}: "
                        "stop it, or give another --data-dir"
                    )
                self._end_orphans(fd)
            _write_owner(fd)
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd

    def release(self) -> None:
        """Lets go of the lock; children that inherited it still hold it."""
        if self._fd is not None:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, 0)
            os.close(self._fd)
            self._fd = None

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _end_orphans(self, fd: int) -> None:
        for send, seconds in ((signal.SIGTERM, _TERM_SECONDS), (signal.SIGKILL, _KILL_SECONDS)):
            for process in _holders(self._path):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, send)
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                if _lock(fd):
                    return
                time.sleep(_POLL_SECONDS)
        raise FolderInUseError(f"{self._path} is still held by another process: end it, or give another --data-dir")


def _lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _write_owner(fd: int) -> None:
    me = psutil.Process()
    text = json.dumps({"pid": me.pid, "started": me.create_time()}).encode()
    os.ftruncate(fd, 0)
    os.pwrite(fd, text, 0)


def _owner(fd: int) -> int | None:
    """The pid of the server that wrote the lock, if that very process still lives."""
    try:
        record = json.loads(os.pread(fd, 4096, 0))
        process = psutil.Process(int(record["pid"]))
        # Pids are used again; a start time tells the two apart.
        alive = abs(process.create_time() - float(record["started"])) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except (ValueError, KeyError, TypeError, psutil.Error):
        return None
    return process.pid if alive else None


def _holders(path: Path) -> list[int]:
    """Processes of this user, other than this one, that have the lock file open."""
    wanted = path.stat()
    found = []
    for folder in Path("/proc").glob("[0-9]*/fd"):
        pid = int(folder.parent.name)
        if pid == os.getpid():
            continue
        try:
            if any(_same(descriptor, wanted) for descriptor in folder.iterdir()):
                found.append(pid)
        except OSError:
            continue
    return found


def _same(descriptor: Path, wanted: os.stat_result) -> bool:
    try:
        seen = descriptor.stat()
    except OSError:
        return False
    return (seen.st_dev, seen.st_ino) == (wanted.st_dev, wanted.st_ino)
