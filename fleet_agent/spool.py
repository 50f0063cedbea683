"""Results of attempts on the agent's disk, from the engine's end until the server's CompleteAck.

An entry is a folder named by the attempt's token with `complete.pb` (an encoded fleet.v1.JobComplete, receipts not yet
filled in), `files.json` (the hash of the former, and name, size and hash of each output) and the output files. It is
written in a folder beside, fsynced and renamed into place, so that after a crash an entry is whole or not there.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson
import structlog
from fleet.v1 import node_pb2
from google.protobuf.message import DecodeError

from fleet_agent.journal import Journal

_log = structlog.get_logger("fleet.agent.spool")
_COMPLETE = "complete.pb"
_FILES = "files.json"
_TOKEN = re.compile(r"[A-Za-z0-9_-]{1,128}\Z")
_SUFFIX = re.compile(r"\.[A-Za-z0-9]{1,16}\Z")


class BadTokenError(ValueError):
    """A token that cannot name a folder."""


class BadOutputError(ValueError):
    """An engine named an output that is no file of its folder."""


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
        self._scratch.mkdir(exist_ok=True)
        for made in (folder, folder.parent):
            _sync_folder(made)
        self._journal = Journal(folder / "journal")

    def work_folder(self, token: str) -> Path:
        """A new empty folder for an attempt's outputs. Raises BadTokenError or OSError."""
        folder = self._scratch / _checked(token)
        try:
            folder.mkdir()
        except (FileExistsError, FileNotFoundError):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        return folder

    def discard(self, token: str) -> None:
        """Removes an attempt's work folder."""
        shutil.rmtree(self._scratch / _checked(token), ignore_errors=True)

    async def keep(self, complete: node_pb2.JobComplete) -> SpoolEntry:
        """Keeps an end without files; returns when it is on the disk: one fsync for all that wait. Raises OSError."""
        token = _checked(complete.token)
        await self._journal.add(complete)
        try:
            (self._scratch / token).rmdir()
        except FileNotFoundError:
            pass
        except OSError:
            await asyncio.to_thread(self.discard, token)
        return SpoolEntry(self._entries, complete, ())

    def forget(self, token: str) -> bool:
        """Forgets an end that `keep` kept, without waiting; False where it is none of those."""
        if token not in self._journal:
            return False
        self._journal.forget(token)
        return True

    async def aclose(self) -> None:
        """Call it when nothing is kept any more."""
        await self._journal.aclose()

    def add(self, complete: node_pb2.JobComplete, outputs: Sequence[tuple[Path, str]]) -> SpoolEntry:
        """Keeps an end and its (path, content type) outputs; returns when they are on the disk.

        The files are taken out of the attempt's work folder, which is removed. Raises BadOutputError for a path that is
        no plain file there, and OSError (ENOSPC among them), with no entry left behind.
        """
        token = _checked(complete.token)
        work, folder, target = self._scratch / token, self._scratch / f"{token}.entry", self._entries / token
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            files = tuple(_take(path, word, work, folder, index) for index, (path, word) in enumerate(outputs))
            data = complete.SerializeToString()
            manifest = {"complete": hashlib.sha256(data).hexdigest(), "files": [asdict(file) for file in files]}
            _write(folder / _FILES, orjson.dumps(manifest))
            _write(folder / _COMPLETE, data)
            _sync_folder(folder)
            shutil.rmtree(target, ignore_errors=True)
            folder.rename(target)
            try:
                _sync_folder(self._entries)
            except OSError:
                self.remove(token)
                raise
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self.discard(token)
        return SpoolEntry(target, complete, files)

    def entries(self) -> list[SpoolEntry]:
        """What is kept, oldest first. A damaged entry is removed; one that cannot be read just now is left alone."""
        kept = [SpoolEntry(self._entries, complete, ()) for complete in self._journal.open()]
        found: list[tuple[int, SpoolEntry]] = []
        for folder in self._entries.iterdir():
            try:
                found.append((folder.stat().st_mtime_ns, _read(folder)))
            except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, KeyError, DecodeError) as error:
                _log.error("a damaged spool entry is removed", entry=folder.name, error=str(error))
                self._drop(folder)
            except OSError as error:
                _log.error("a spool entry cannot be read", entry=folder.name, error=str(error))
        return [*kept, *(entry for _, entry in sorted(found, key=lambda pair: (pair[0], pair[1].token)))]

    def remove(self, token: str) -> None:
        """Forgets an entry, once it is acknowledged."""
        if self.forget(token):
            return
        self._drop(self._entries / _checked(token))

    def _drop(self, path: Path) -> None:
        """Takes an entry away in one step: a crash leaves it whole, or gone but for scratch."""
        gone = self._scratch / f"{path.name}.gone"
        shutil.rmtree(gone, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            path.rename(gone)
        if gone.is_dir():
            shutil.rmtree(gone, ignore_errors=True)
        else:
            gone.unlink(missing_ok=True)


def _checked(token: str) -> str:
    if not _TOKEN.match(token):
        raise BadTokenError(f"token: must be 1 to 128 letters, digits, '_' or '-', got {token[:140]!r}")
    return token


def _read(folder: Path) -> SpoolEntry:
    data = (folder / _COMPLETE).read_bytes()
    manifest = orjson.loads((folder / _FILES).read_bytes())
    if hashlib.sha256(data).hexdigest() != manifest["complete"]:
        raise ValueError(f"{_COMPLETE} is not what {_FILES} says")
    complete = node_pb2.JobComplete.FromString(data)
    files = tuple(SpooledFile(**fields) for fields in manifest["files"])
    if complete.token != folder.name or len(files) != len(complete.outputs):
        raise ValueError("the parts of the entry do not belong together")
    for file in files:
        size = (folder / file.name).stat().st_size
        if size != file.size_bytes:
            raise ValueError(f"{file.name} has {size} bytes, not {file.size_bytes}")
    return SpoolEntry(folder, complete, files)


def _take(path: Path, content_type: str, work: Path, folder: Path, index: int) -> SpooledFile:
    """Moves an output into the entry; its bytes are on the disk when this returns."""
    if path.parent.resolve() != work.resolve() and work.resolve() not in path.parent.resolve().parents:
        raise BadOutputError(f"the engine named {path.name}, which is not in its output folder")
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        raise BadOutputError(f"the engine named {path.name}, but wrote no such file") from None
    if not stat.S_ISREG(mode):
        raise BadOutputError(f"the engine named {path.name}, which is no plain file")
    target = folder / f"{index}{path.suffix if _SUFFIX.match(path.suffix) else ''}"
    path.rename(target)
    with target.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
        size = file.tell()
    return SpooledFile(target.name, content_type, size, digest)


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
