"""Where the embedded S3 keeps objects: bytes in files with drawn names, everything else in one SQLite file.

An object is there when its row is: bytes are on the disk (fsync of file and folder) before the row is written, and the
row is on the disk before a put is answered. Names of objects never become paths. What a crash leaves behind is removed
at the next start. All methods block: they are called in threads, one call at a time for each connection.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from fleet_server.disk import lasting_folder, sync_folder

_SCHEMA = """
CREATE TABLE IF NOT EXISTS buckets (name TEXT PRIMARY KEY, created_ms INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS objects (
    bucket TEXT NOT NULL, key TEXT NOT NULL, blob TEXT NOT NULL, size INTEGER NOT NULL, etag TEXT NOT NULL,
    modified_ms INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, headers TEXT NOT NULL, PRIMARY KEY (bucket, key)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS uploads (
    id TEXT PRIMARY KEY, bucket TEXT NOT NULL, key TEXT NOT NULL, headers TEXT NOT NULL, created_ms INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS parts (
    upload TEXT NOT NULL, number INTEGER NOT NULL, blob TEXT NOT NULL, size INTEGER NOT NULL, md5 TEXT NOT NULL,
    modified_ms INTEGER NOT NULL, PRIMARY KEY (upload, number)
) WITHOUT ROWID;
"""
_PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class Blob:
    """Bytes on the disk that belong to nothing yet. `md5` is lower-case hex."""

    name: str
    size: int
    md5: str


@dataclass(frozen=True, slots=True)
class Item:
    """An object. `etag` without quotes; `headers` as they are given back, `x-amz-meta-*` among them."""

    key: str
    size: int
    etag: str
    modified_ms: int
    blob: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Upload:
    """An upload in parts that has not ended."""

    upload_id: str
    bucket: str
    key: str
    headers: Mapping[str, str]
    created_ms: int


@dataclass(frozen=True, slots=True)
class PartRow:
    """A part of one."""

    number: int
    blob: str
    size: int
    md5: str
    modified_ms: int


class NewBlob:
    """A file that is being written; `finish` it or `discard` it."""

    def __init__(self, folder: Path) -> None:
        self._name = uuid.uuid4().hex
        self._path = folder / self._name[:2] / self._name
        self._path.parent.mkdir(mode=0o700, exist_ok=True)
        self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._md5 = hashlib.md5(usedforsecurity=False)
        self._size = 0

    def write(self, data: bytes) -> None:
        """Appends all of it. Raises OSError."""
        view = memoryview(data)
        while view:
            view = view[os.write(self._file, view) :]
        self._md5.update(data)
        self._size += len(data)

    def finish(self) -> Blob:
        """Makes it durable."""
        os.fsync(self._file)
        os.close(self._file)
        self._file = -1
        for folder in (self._path.parent, self._path.parent.parent):
            sync_folder(folder)
        return Blob(self._name, self._size, self._md5.hexdigest())

    def discard(self) -> None:
        """As if it had never been."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        self._path.unlink(missing_ok=True)


class Shelf:
    """Buckets, objects and unfinished uploads under `folder`; opening it removes what a crash has left there."""

    def __init__(self, folder: Path, *, stale_upload_ms: int = 0) -> None:
        self._blobs = folder / "blobs"
        for made in (folder, self._blobs):
            lasting_folder(made, 0o700)
        self._lock = threading.Lock()
        self._db = sqlite3.connect(folder / "objects.sqlite", check_same_thread=False, isolation_level=None)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.executescript(_SCHEMA)
        with self._change() as db:
            db.execute("DELETE FROM uploads WHERE created_ms < ?", (stale_upload_ms,))
            db.execute("DELETE FROM parts WHERE upload NOT IN (SELECT id FROM uploads)")
        self._sweep()

    def close(self) -> None:
        """Ends the connection."""
        self._db.close()

    def free_bytes(self) -> int:
        """What the disk has left."""
        disk = os.statvfs(self._blobs)
        return disk.f_bavail * disk.f_frsize

    # Bytes.

    def new_blob(self) -> NewBlob:
        """A fresh file to write to."""
        return NewBlob(self._blobs)

    def open_blob(self, name: str) -> int:
        """A descriptor to read from. Raises FileNotFoundError."""
        return os.open(self._path(name), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)

    def drop_blob(self, name: str) -> None:
        """Removes bytes that belong to nothing; those who read them go on."""
        self._path(name).unlink(missing_ok=True)

    def joined(self, blobs: Sequence[str]) -> Blob:
        """The bytes of several in a fresh one. Raises OSError."""
        new = self.new_blob()
        try:
            for name in blobs:
                file = self.open_blob(name)
                try:
                    while piece := os.read(file, _PIECE):
                        new.write(piece)
                finally:
                    os.close(file)
            return new.finish()
        except BaseException:
            new.discard()
            raise

    # Buckets.

    def buckets(self) -> list[tuple[str, int]]:
        """Names and times of creation, by name."""
        return self._all("SELECT name, created_ms FROM buckets ORDER BY name")

    def has_bucket(self, bucket: str) -> bool:
        """Whether there is one."""
        return bool(self._all("SELECT 1 FROM buckets WHERE name = ?", (bucket,)))

    def add_bucket(self, bucket: str, now_ms: int) -> bool:
        """Makes one; False where it was there."""
        with self._change() as db:
            return db.execute("INSERT OR IGNORE INTO buckets VALUES (?, ?)", (bucket, now_ms)).rowcount == 1

    def drop_bucket(self, bucket: str) -> bool:
        """Removes an empty one; False where it has objects."""
        with self._change() as db:
            if db.execute("SELECT 1 FROM objects WHERE bucket = ? LIMIT 1", (bucket,)).fetchone():
                return False
            db.execute("DELETE FROM buckets WHERE name = ?", (bucket,))
            return True

    # Objects.

    def put(
        self,
        bucket: str,
        key: str,
        blob: Blob,
        *,
        etag: str,
        headers: Mapping[str, str],
        now_ms: int,
        new: bool = False,
    ) -> bool:
        """Gives bytes a name, in place of what had it; `new`: only where nothing has, else False."""
        mtime = self._path(blob.name).stat().st_mtime_ns
        with self._change() as db:
            old = db.execute("SELECT blob FROM objects WHERE bucket = ? AND key = ?", (bucket, key)).fetchone()
            if old and new:
                return False
            db.execute(
                "INSERT OR REPLACE INTO objects VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (bucket, key, blob.name, blob.size, etag, now_ms, mtime, json.dumps(dict(headers))),
            )
        if old:
            self.drop_blob(old[0])
        return True

    def get(self, bucket: str, key: str) -> Item | None:
        """An object, None if there is none.

        Its ETag is of the bytes that are on the disk now: where the file is not as it was written, it is hashed again.
        """
        rows = self._all(
            "SELECT key, size, etag, modified_ms, blob, headers, mtime_ns FROM objects WHERE bucket = ? AND key = ?",
            (bucket, key),
        )
        if not rows:
            return None
        name, size, etag, modified_ms, blob, headers, mtime = rows[0]
        item = Item(name, size, etag, modified_ms, blob, json.loads(headers))
        try:
            seen = self._path(item.blob).stat()
        except FileNotFoundError:
            return None
        if (seen.st_size, seen.st_mtime_ns) == (item.size, mtime):
            return item
        return Item(item.key, seen.st_size, self._hashed(item.blob), item.modified_ms, item.blob, item.headers)

    def delete(self, bucket: str, key: str) -> None:
        """Removes an object; fine where there is none."""
        with self._change() as db:
            row = db.execute(
                "DELETE FROM objects WHERE bucket = ? AND key = ? RETURNING blob", (bucket, key)
            ).fetchone()
        if row:
            self.drop_blob(row[0])

    def keys(self, bucket: str, prefix: str, after: str, limit: int) -> list[Item]:
        """The first objects with that prefix after `after`, in the order of their bytes."""
        floor = max(prefix, after)
        rows = self._all(
            "SELECT key, size, etag, modified_ms FROM objects WHERE bucket = ? AND key >= ? AND key > ?"
            " ORDER BY key LIMIT ?",
            (bucket, floor, after, limit),
        )
        return [Item(*row) for row in rows if row[0].startswith(prefix)]

    # Uploads in parts.

    def begin(self, bucket: str, key: str, headers: Mapping[str, str], now_ms: int) -> str:
        """A fresh upload's id."""
        upload_id = uuid.uuid4().hex
        with self._change() as db:
            row = (upload_id, bucket, key, json.dumps(dict(headers)), now_ms)
            db.execute("INSERT INTO uploads VALUES (?, ?, ?, ?, ?)", row)
        return upload_id

    def upload(self, upload_id: str) -> Upload | None:
        """An unfinished upload."""
        return next(iter(self._uploads("WHERE id = ?", (upload_id,))), None)

    def uploads(self, bucket: str) -> list[Upload]:
        """All of a bucket, at most 1,000."""
        return list(self._uploads("WHERE bucket = ? ORDER BY key, id LIMIT 1000", (bucket,)))

    def add_part(self, upload_id: str, number: int, blob: Blob, now_ms: int) -> bool:
        """Adds or replaces a part; False where the upload is gone."""
        with self._change() as db:
            if not db.execute("SELECT 1 FROM uploads WHERE id = ?", (upload_id,)).fetchone():
                return False
            old = db.execute("SELECT blob FROM parts WHERE upload = ? AND number = ?", (upload_id, number)).fetchone()
            row = (upload_id, number, blob.name, blob.size, blob.md5, now_ms)
            db.execute("INSERT OR REPLACE INTO parts VALUES (?, ?, ?, ?, ?, ?)", row)
        if old:
            self.drop_blob(old[0])
        return True

    def parts(self, upload_id: str) -> list[PartRow]:
        """Its parts by number."""
        rows = self._all(
            "SELECT number, blob, size, md5, modified_ms FROM parts WHERE upload = ? ORDER BY number", (upload_id,)
        )
        return [PartRow(*row) for row in rows]

    def end(self, upload_id: str) -> None:
        """Forgets an upload and drops its parts."""
        with self._change() as db:
            db.execute("DELETE FROM uploads WHERE id = ?", (upload_id,))
            blobs = db.execute("DELETE FROM parts WHERE upload = ? RETURNING blob", (upload_id,)).fetchall()
        for (blob,) in blobs:
            self.drop_blob(blob)

    # Inside.

    def _uploads(self, where: str, values: tuple[str, ...]) -> Iterable[Upload]:
        rows = self._all(f"SELECT id, bucket, key, headers, created_ms FROM uploads {where}", values)
        return [Upload(row[0], row[1], row[2], json.loads(row[3]), row[4]) for row in rows]

    def _path(self, name: str) -> Path:
        return self._blobs / name[:2] / name

    def _hashed(self, name: str) -> str:
        md5 = hashlib.md5(usedforsecurity=False)
        with self._path(name).open("rb") as file:
            while piece := file.read(_PIECE):
                md5.update(piece)
        return md5.hexdigest()

    def _all(self, query: str, values: tuple[object, ...] = ()) -> list[tuple]:  # type: ignore[type-arg]
        with self._lock:
            return self._db.execute(query, values).fetchall()

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def _sweep(self) -> None:
        known = {row[0] for row in self._all("SELECT blob FROM objects UNION ALL SELECT blob FROM parts")}
        for file in self._blobs.glob("*/*"):
            if file.name not in known:
                with suppress(OSError):
                    file.unlink()
