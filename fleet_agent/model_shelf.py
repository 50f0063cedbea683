"""The model folder as a cache with a budget: what was brought, what is being brought, what may go.

A file that was brought has a note beside it, `<file>.fleet.json`, with its hash and where it is from; a file without
one, or that has changed since, was put there by hand. What is being brought lies in `.partial` with a note of how far
it is surely on the disk. Everything here blocks; it is for threads, one call a file at a time.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from fleet_agent.disk import lasting_folder, sync_folder
from fleet_agent.engines.base import ModelKind
from fleet_agent.engines.models import FOLDERS

P = ParamSpec("P")
T = TypeVar("T")
PARTIAL = ".partial"
NOTE_SUFFIX = ".fleet.json"
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9 ._+()\[\]@=,~#-]{0,200}")
_CHUNK = 1 << 20
_OLD_SECONDS = 7 * 86_400.0
FileKey = tuple[ModelKind, str]
"""Kind and name of a model file."""


class BadNameError(ValueError):
    """No name for a model file."""


@dataclass(frozen=True, slots=True)
class Source:
    """A file as the server describes it. `sha256` is empty where it is not known."""

    kind: ModelKind
    name: str
    reference: str
    size_bytes: int
    sha256: str = ""
    etag: str = ""

    @property
    def key(self) -> FileKey:
        return self.kind, self.name


@dataclass(frozen=True, slots=True)
class Kept:
    """A whole file. `brought`: by this agent, unchanged since. `used_at` is Unix seconds."""

    kind: ModelKind
    name: str
    path: Path
    size_bytes: int
    used_at: float
    brought: bool

    @property
    def key(self) -> FileKey:
        return self.kind, self.name


def _whole(step: Callable[Concatenate[Partial, P], T]) -> Callable[Concatenate[Partial, P], T]:
    """One step after another: who gave a download up closes the file when the step that its thread is at has ended."""

    @functools.wraps(step)
    def alone(partial: Partial, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with partial.turn:
            return step(partial, *args, **kwargs)

    return alone


class Partial:
    """A file in the making. One owner; `close` it."""

    def __init__(self, folder: Path, source: Source, sync_bytes: int) -> None:
        self._source = source
        self._sync_bytes = sync_bytes
        stem = hashlib.sha256(f"{source.kind}/{source.name}".encode()).hexdigest()[:32]
        self.path = folder / f"{stem}.part"
        self._note = folder / f"{stem}.json"
        self.turn = threading.RLock()
        self._fd = -1
        self._synced = 0
        self._digest = hashlib.sha256()
        self.size = 0

    @_whole
    def open(self) -> None:
        """Goes on where the same file was left: what was synced is read again for its hash.

        Raises OSError; BlockingIOError where another agent on the same folder is bringing it.
        """
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        synced = self._left()
        self.size = min(synced, os.fstat(self._fd).st_size, self._source.size_bytes)
        os.ftruncate(self._fd, self.size)
        at = 0
        while at < self.size:
            chunk = os.pread(self._fd, min(_CHUNK, self.size - at), at)
            if not chunk:
                break
            self._digest.update(chunk)
            at += len(chunk)
        self._synced = self.size
        self._write_note()

    @_whole
    def write(self, data: bytes) -> None:
        """Appends. Raises OSError, nothing being counted then."""
        done = 0
        while done < len(data):
            done += os.pwrite(self._fd, memoryview(data)[done:], self.size + done)
        self._digest.update(data)
        self.size += len(data)
        if self.size - self._synced >= self._sync_bytes:
            self.sync()

    def sync(self) -> None:
        """What was written is surely on the disk."""
        os.fdatasync(self._fd)
        self._synced = self.size
        self._write_note()

    @property
    def sha256(self) -> str:
        """Hash of what is there."""
        return self._digest.hexdigest()

    @_whole
    def restart(self) -> None:
        """Forgets all bytes."""
        self.size = self._synced = 0
        self._digest = hashlib.sha256()
        os.ftruncate(self._fd, 0)
        self._write_note()

    @_whole
    def publish(self, target: Path) -> None:
        """The whole file takes its place, with its note. Raises OSError."""
        os.fsync(self._fd)
        lasting_folder(target.parent)
        status = os.fstat(self._fd)
        note = {**asdict(self._source), "sha256": self.sha256, "mtime_ns": status.st_mtime_ns}
        _write(note_of(target), note)
        self.path.rename(target)
        sync_folder(target.parent)
        self._note.unlink(missing_ok=True)
        self.close()

    @_whole
    def discard(self) -> None:
        """It is not wanted any more."""
        self.close()
        for path in (self.path, self._note):
            path.unlink(missing_ok=True)

    @_whole
    def close(self) -> None:
        """Leaves it for the next time."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _left(self) -> int:
        """How much of this very file was left, surely."""
        note = _read(self._note)
        same = note is not None and note.get("source") == asdict(self._source)
        synced = note.get("synced") if same and note is not None else 0
        return synced if isinstance(synced, int) else 0

    def _write_note(self) -> None:
        _write(self._note, {"source": asdict(self._source), "synced": self._synced})


class ModelShelf:
    """Files under `folder`, as `engines.models.ModelFolder` lists them."""

    def __init__(self, folder: Path, *, sync_bytes: int = 16 << 20) -> None:
        self._folder = folder
        self._sync_bytes = sync_bytes
        self._partials = folder / PARTIAL

    def open(self) -> None:
        """Removes what is a week old in `.partial`, and notes whose file is gone. Raises OSError."""
        self._partials.mkdir(parents=True, exist_ok=True)
        limit = time.time() - _OLD_SECONDS
        for path in self._partials.iterdir():
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < limit:
                    path.unlink()
        for sub in FOLDERS:
            for note in (self._folder / sub).rglob(f"*{NOTE_SUFFIX}"):
                if not note.with_name(note.name.removesuffix(NOTE_SUFFIX)).exists():
                    note.unlink(missing_ok=True)

    def path(self, kind: str, name: str) -> Path:
        """Where a file of that name belongs. Raises BadNameError."""
        folder = next((sub for sub, its in FOLDERS.items() if its == kind), None)
        parts = name.split("/")
        if folder is None or len(name) > 255 or not all(_PART.fullmatch(part) for part in parts):
            raise BadNameError(f"{name[:255]!r} is no name for a {kind} file")
        if not name.endswith(".safetensors"):
            raise BadNameError(f"{name!r}: only .safetensors files are brought to nodes")
        path = self._folder / folder / Path(*parts)
        if path.parent.resolve() != (self._folder / folder).resolve() / Path(*parts[:-1]):
            raise BadNameError(f"{name!r} would lie outside the model folder")
        return path

    def partial(self, source: Source) -> Partial:
        """The file in the making, not yet opened."""
        self._partials.mkdir(parents=True, exist_ok=True)
        return Partial(self._partials, source, self._sync_bytes)

    def note(self, path: Path) -> dict[str, Any] | None:
        """What is written beside a file that was brought and is as it was; None for any other."""
        note = _read(note_of(path))
        if note is None:
            return None
        try:
            status = path.stat()
        except OSError:
            return None
        same = note.get("size_bytes") == status.st_size and note.get("mtime_ns") == status.st_mtime_ns
        return note if same else None

    def survey(self) -> list[Kept]:
        """Every whole model file."""
        found = []
        for sub, kind in FOLDERS.items():
            root = self._folder / sub
            for path in root.rglob("*.safetensors"):
                try:
                    status = path.stat()
                except OSError:
                    continue
                name, brought = path.relative_to(root).as_posix(), self.note(path) is not None
                found.append(Kept(kind, name, path, status.st_size, status.st_atime, brought))
        return found

    def free_bytes(self) -> int:
        """What is free on the folder's disk."""
        return shutil.disk_usage(self._folder).free

    def remove(self, path: Path) -> None:
        """Deletes a file and its note."""
        path.unlink(missing_ok=True)
        note_of(path).unlink(missing_ok=True)

    def used(self, paths: Iterable[Path]) -> None:
        """These files are being used now: the time of their last use is their access time, kept by the file system."""
        now = time.time_ns()
        for path in paths:
            with contextlib.suppress(OSError):
                os.utime(path, ns=(now, path.stat().st_mtime_ns))


def victims(
    kept: Iterable[Kept], needed: int, *, may_go: Callable[[Kept], bool], total: int, budget: int, free: int, floor: int
) -> list[Kept] | None:
    """The files that have to go for `needed` more bytes, the longest unused first; None where it cannot be done.

    `total` bytes are counted in the budget now (0: there is none); at least `floor` of the disk's `free` are kept.
    """
    over = max(total + needed - budget if budget else 0, needed + floor - free)
    gone: list[Kept] = []
    for one in sorted((one for one in kept if may_go(one)), key=lambda one: (one.used_at, one.name)):
        if over <= 0:
            break
        gone.append(one)
        over -= one.size_bytes
    return gone if over <= 0 else None


def note_of(path: Path) -> Path:
    """Where the note of a file lies."""
    return path.with_name(path.name + NOTE_SUFFIX)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        raw = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return raw if isinstance(raw, dict) else None


def _write(path: Path, value: dict[str, Any]) -> None:
    aside = path.with_name(f"{path.name}.new")
    with aside.open("w") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
