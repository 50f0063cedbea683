"""Results of attempts on the agent's disk, from the engine's end until the server's CompleteAck.

An entry is a folder named by the attempt's token with `complete.pb` (an encoded fleet.v1.JobComplete, receipts not yet
filled in), `files.json` and the output files. It is written in a folder beside, fsynced and renamed into place, so that
after a crash an entry is whole or not there.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson
from fleet.v1 import node_pb2

_COMPLETE = "complete.pb"
_FILES = "files.json"


@dataclass(frozen=True, slots=True)
class SpooledFile:
    """An output in the spool."""

    name: str
    content_type: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class SpoolEntry:
    """The end of one attempt, not yet acknowledged."""

    folder: Path
    complete: node_pb2.JobComplete
    files: tuple[SpooledFile, ...]

    @property
    def token(self) -> str:
        return self.complete.token


class Spool:
    """The entries under one folder. All methods block: call them in a thread. Each is safe to repeat."""

    def __init__(self, folder: Path) -> None:
        self._entries = folder / "entries"
        self._scratch = folder / "scratch"
        self._entries.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._scratch.mkdir(parents=True)

    def work_folder(self, token: str) -> Path:
        """A new empty folder for an attempt's outputs."""
        folder = self._scratch / token
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def discard(self, token: str) -> None:
        """Removes an attempt's work folder."""
        shutil.rmtree(self._scratch / token, ignore_errors=True)

    def add(self, complete: node_pb2.JobComplete, outputs: Sequence[tuple[Path, str]]) -> SpoolEntry:
        """Keeps an end and its (path, content type) outputs; returns when they are on the disk.

        Raises OSError (ENOSPC among them) with no entry left behind.
        """
        folder = self._scratch / f"{complete.token}.entry"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            files = tuple(_take(path, content_type, folder, i) for i, (path, content_type) in enumerate(outputs))
            _write(folder / _FILES, orjson.dumps([asdict(file) for file in files]))
            _write(folder / _COMPLETE, complete.SerializeToString())
            _sync_folder(folder)
            target = self._entries / complete.token
            shutil.rmtree(target, ignore_errors=True)
            folder.rename(target)
            _sync_folder(self._entries)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self.discard(complete.token)
        return SpoolEntry(target, complete, files)

    def entries(self) -> list[SpoolEntry]:
        """What is kept, oldest first; a damaged entry is removed."""
        found = []
        for folder in sorted(self._entries.iterdir(), key=lambda path: path.stat().st_mtime_ns):
            try:
                complete = node_pb2.JobComplete.FromString((folder / _COMPLETE).read_bytes())
                files = tuple(SpooledFile(**fields) for fields in orjson.loads((folder / _FILES).read_bytes()))
            except (OSError, ValueError, TypeError):
                shutil.rmtree(folder, ignore_errors=True)
                continue
            found.append(SpoolEntry(folder, complete, files))
        return found

    def remove(self, token: str) -> None:
        """Forgets an entry, once it is acknowledged."""
        shutil.rmtree(self._entries / token, ignore_errors=True)


def _take(path: Path, content_type: str, folder: Path, index: int) -> SpooledFile:
    target = folder / f"{index}{path.suffix}"
    path.rename(target)
    digest = hashlib.sha256()
    with target.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
        os.fsync(file.fileno())
        size = file.tell()
    return SpooledFile(target.name, content_type, size, digest.hexdigest())


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
