"""Results of attempts on the agent's disk, from the engine's end until the server's CompleteAck.

An entry is a file `TOKEN.end` (a line of JSON: a hash of what follows, and name, size and hash of each output file;
then an encoded fleet.v1.JobComplete, receipts not yet filled in) and the output files `TOKEN.INDEX.SUFFIX` beside it.
The outputs are there, and fsynced, before the end gets its name, so that after a crash an entry is whole or not there:
files without an end are removed at the start. Small outputs are in the JobComplete itself; an end without files is a
record of the journal.
"""

from __future__ import annotations

import asyncio
import glob
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

from fleet_agent.disk import lasting_folder
from fleet_agent.journal import Journal

_log = structlog.get_logger("fleet.agent.spool")
_END = ".end"
_DESKS = 256
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
    """The end of one attempt, not yet acknowledged. `files` lie in `folder`; none where outputs are in `complete`."""

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
        self._desks = folder / "desks"
        self._spare: list[Path] = []
        self._taken: dict[str, Path] = {}
        """Work folders that were used before, by the attempt that has one now."""
        for made in (folder, self._entries):
            lasting_folder(made)
        self._remove_halves()
        for emptied in (self._scratch, self._desks):
            shutil.rmtree(emptied, ignore_errors=True)
            emptied.mkdir(exist_ok=True)
        self._journal = Journal(folder / "journal")

    def work_folder(self, token: str) -> Path:
        """An empty folder for an attempt's outputs. Raises BadTokenError or OSError."""
        _checked(token)
        if token in self._taken:
            self.discard(token)
        if self._spare:
            self._taken[token] = self._spare.pop()
            return self._taken[token]
        folder = self._scratch / token
        try:
            folder.mkdir()
        except (FileExistsError, FileNotFoundError):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        return folder

    def discard(self, token: str) -> None:
        """Removes an attempt's work folder."""
        shutil.rmtree(self._work(_checked(token), forget=True), ignore_errors=True)

    def _work(self, token: str, *, forget: bool = False) -> Path:
        taken = self._taken.pop(token, None) if forget else self._taken.get(token)
        return taken or self._scratch / token

    def _tidy(self, token: str) -> bool:
        """Keeps an attempt's work folder for another where nothing is in it: making and removing folders waits for
        other programs' fsyncs. False: something is in it."""
        taken = self._taken.get(token)
        try:
            if taken is not None:
                if _filled(taken):
                    return False
                self._spare.append(self._taken.pop(token))
            elif len(self._spare) + len(self._taken) < _DESKS:
                if _filled(self._scratch / token):
                    return False
                desk = self._desks / token
                (self._scratch / token).rename(desk)
                self._spare.append(desk)
            else:
                (self._scratch / token).rmdir()
        except FileNotFoundError:
            pass
        except OSError:
            return False
        return True

    async def keep(self, complete: node_pb2.JobComplete) -> SpoolEntry:
        """Keeps an end without files; returns when it is on the disk: one fsync for all that wait. Raises OSError."""
        token = _checked(complete.token)
        await self._journal.add(complete)
        if not self._tidy(token):
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
        """`stage`, then `commit`."""
        entry = self.stage(complete, outputs)
        self.commit(entry)
        return entry

    def stage(self, complete: node_pb2.JobComplete, outputs: Sequence[tuple[Path, str]]) -> SpoolEntry:
        """Takes an end and its (path, content type) outputs over; an entry, kept by no crash until `commit`.

        The files are taken out of the attempt's work folder; they may be read at once and do not change or move until
        `remove`. Raises BadOutputError for a path that is no plain file there, and OSError, with nothing left behind.
        """
        token = _checked(complete.token)
        if not outputs:
            return SpoolEntry(self._entries, complete, ())
        work = self._work(token)
        for path, _ in outputs:
            _judge(path, work)
        self._drop(token)
        try:
            files = tuple(self._take(token, index, *output) for index, output in enumerate(outputs))
        except BaseException:
            self._drop(token)
            raise
        return SpoolEntry(self._entries, complete, files)

    def commit(self, entry: SpoolEntry) -> None:
        """Keeps a staged entry; returns when it is on the disk. The attempt's work folder is removed.

        Raises OSError (ENOSPC among them), with no entry left behind.
        """
        token = entry.token
        data = entry.complete.SerializeToString()
        head = {"sha256": hashlib.sha256(data).hexdigest(), "files": [asdict(file) for file in entry.files]}
        written = self._scratch / f"{token}{_END}"
        try:
            for file in entry.files:
                _sync(self._entries / file.name)
            with written.open("wb") as end:
                end.write(orjson.dumps(head) + b"\n" + data)
                end.flush()
                os.fsync(end.fileno())
            written.rename(self._entries / written.name)
            _sync(self._entries)
        except BaseException:
            written.unlink(missing_ok=True)
            self._drop(token)
            raise
        self.discard(token)

    def entries(self) -> list[SpoolEntry]:
        """What is kept, oldest first. A damaged entry is removed; one that cannot be read just now is left alone."""
        kept = [SpoolEntry(self._entries, complete, ()) for complete in self._journal.open()]
        found: list[tuple[int, SpoolEntry]] = []
        for end in self._entries.glob(f"*{_END}"):
            try:
                found.append((end.stat().st_mtime_ns, _read(end)))
            except (FileNotFoundError, IsADirectoryError, ValueError, TypeError, KeyError, DecodeError) as error:
                _log.error("a damaged spool entry is removed", entry=end.stem, error=str(error))
                self._drop(end.stem)
            except OSError as error:
                _log.error("a spool entry cannot be read", entry=end.stem, error=str(error))
        return [*kept, *(entry for _, entry in sorted(found, key=lambda pair: (pair[0], pair[1].token)))]

    def remove(self, token: str) -> None:
        """Forgets an entry, staged or kept, once it is acknowledged."""
        if not self.forget(token):
            self._drop(_checked(token))

    def _drop(self, token: str) -> None:
        """The end first: a crash leaves files without one, which are none of anybody's."""
        _delete(self._entries / f"{token}{_END}")
        for path in self._entries.glob(f"{glob.escape(token)}.*"):
            _delete(path)

    def _remove_halves(self) -> None:
        """Removes the outputs of ends that were never written, or are forgotten."""
        tokens = {path.stem for path in self._entries.glob(f"*{_END}")}
        for path in self._entries.iterdir():
            if path.name.partition(".")[0] not in tokens:
                _delete(path)

    def _take(self, token: str, index: int, path: Path, content_type: str) -> SpooledFile:
        target = self._entries / f"{token}.{index}{path.suffix if _SUFFIX.match(path.suffix) else ''}"
        path.rename(target)
        with target.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            size = file.tell()
        return SpooledFile(target.name, content_type, size, digest)


def _filled(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return any(True for _ in entries)


def _checked(token: str) -> str:
    if not _TOKEN.match(token):
        raise BadTokenError(f"token: must be 1 to 128 letters, digits, '_' or '-', got {token[:140]!r}")
    return token


def _read(end: Path) -> SpoolEntry:
    head, _, data = end.read_bytes().partition(b"\n")
    known = orjson.loads(head)
    if hashlib.sha256(data).hexdigest() != known["sha256"]:
        raise ValueError("its bytes are not what its first line says")
    complete = node_pb2.JobComplete.FromString(data)
    files = tuple(SpooledFile(**fields) for fields in known["files"])
    apart = sum(not output.HasField("data") for output in complete.outputs)
    if complete.token != end.stem or len(files) != apart:
        raise ValueError("the parts of the entry do not belong together")
    for file in files:
        size = (end.parent / file.name).stat().st_size
        if size != file.size_bytes:
            raise ValueError(f"{file.name} has {size} bytes, not {file.size_bytes}")
    return SpoolEntry(end.parent, complete, files)


def _judge(path: Path, work: Path) -> None:
    """Raises BadOutputError for what is no plain file in the work folder."""
    if path.parent != work and work.resolve() not in (path.parent.resolve(), *path.parent.resolve().parents):
        raise BadOutputError(f"the engine named {path.name}, which is not in its output folder")
    try:
        status = path.lstat()
    except FileNotFoundError:
        raise BadOutputError(f"the engine named {path.name}, but wrote no such file") from None
    if not stat.S_ISREG(status.st_mode):
        raise BadOutputError(f"the engine named {path.name}, which is no plain file")


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
