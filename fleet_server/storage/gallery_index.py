"""A search index of outputs on this machine, made of the store's rows. Losing it loses nothing: it is made again.

Every filter is a word of a full-text index, those of the prompt and those of the fields alike, so that any set of them
is one intersection that yields the newest first. Rows have ids that rise with their time.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import sqlite3
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
_WORD = re.compile(r"\w+")
_VERSION = 1
_TIE_BITS = 20
_LAST_ID = 1 << 62
_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE rows (id INTEGER PRIMARY KEY, filename TEXT NOT NULL UNIQUE, content BLOB NOT NULL);
CREATE VIRTUAL TABLE words USING fts5(text, tokenize="ascii tokenchars '_:'", detail=none);
"""


@dataclass(frozen=True, slots=True)
class IndexRow:
    """One output as it is found. `words` are of the prompt, `marks` of the fields ("model:x"); `content` comes back."""

    filename: str
    created_ms: int
    prompt: str
    marks: Sequence[str]
    content: bytes


@dataclass(frozen=True, slots=True)
class Found:
    """A row of a page."""

    filename: str
    content: bytes


@dataclass(frozen=True, slots=True)
class Span:
    """Which outputs: older than (`before_ms`, `before_name`), not before `after_ms`. None: no bound.

    Without `before_name` those of `before_ms` itself are too young."""

    before_ms: int | None = None
    before_name: str = ""
    after_ms: int | None = None


class GalleryIndex:
    """One file of SQLite, used by one thread. `place` is how far it has followed the store."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="gallery")
        self._db: sqlite3.Connection | None = None
        self.place = 0
        self.epoch = ""

    async def open(self) -> None:
        """Opens the file, or makes it anew where it cannot be used. Raises OSError, sqlite3.OperationalError."""
        await self._run(self._open)

    async def aclose(self) -> None:
        """Ends the thread; work under way is finished first."""
        await self._run(self._close)
        await asyncio.to_thread(self._thread.shutdown)

    async def apply(self, epoch: str, place: int, rows: Iterable[tuple[str, IndexRow | None]]) -> None:
        """Takes changes in, None for a row that is gone, and remembers how far it is. All or nothing."""
        await self._run(lambda db: self._apply(db, epoch, place, list(rows)))

    async def clear(self, epoch: str) -> None:
        """Forgets all, to follow the store from its beginning."""
        await self._run(lambda db: self._clear(db, epoch))

    async def page(self, span: Span, prompt: str, marks: Sequence[str], limit: int) -> list[Found]:
        """The newest outputs of the span that have all the words of `prompt` and all marks."""
        return await self._run(lambda db: _page(db, span, [*words_of(prompt), *map(mark, marks)], limit))

    async def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        def step() -> T:
            if self._db is None:
                self._db = self._connect()
            try:
                return work(self._db)
            except sqlite3.OperationalError:
                raise
            except sqlite3.DatabaseError:
                # The file is spoiled: begin again with an empty one.
                self._db.close()
                self._db = None
                self._remove()
                self._db = self._connect()
                return work(self._db)

        return await asyncio.get_running_loop().run_in_executor(self._thread, step)

    # In the thread.

    def _open(self, db: sqlite3.Connection) -> None:
        known = dict(db.execute("SELECT name, value FROM meta"))
        self.epoch, self.place = known.get("epoch", ""), int(known.get("place", 0))

    def _close(self, db: sqlite3.Connection) -> None:
        db.close()
        self._db = None

    def _connect(self) -> sqlite3.Connection:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        db = self._connected()
        try:
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if version == _VERSION:
                db.execute("SELECT count(*) FROM meta").fetchone()
                return db
        except sqlite3.DatabaseError:
            pass
        db.close()
        self._remove()
        self.place, self.epoch = 0, ""
        db = self._connected()
        db.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {_VERSION}; COMMIT;")
        return db

    def _connected(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
        # What a power cut takes from it, it takes from the store again; what it spoils is found and made anew.
        with contextlib.suppress(sqlite3.DatabaseError):
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = OFF")
        return db

    def _remove(self) -> None:
        for suffix in ("", "-wal", "-shm"):
            self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)

    def _apply(
        self, db: sqlite3.Connection, epoch: str, place: int, rows: Sequence[tuple[str, IndexRow | None]]
    ) -> None:
        with _transaction(db):
            for filename, row in rows:
                known = db.execute("SELECT id FROM rows WHERE filename = ?", (filename,)).fetchone()
                if known is not None:
                    db.execute("DELETE FROM words WHERE rowid = ?", known)
                    db.execute("DELETE FROM rows WHERE id = ?", known)
                if row is not None:
                    number = known[0] if known is not None else _free_id(db, row.created_ms, filename)
                    text = " ".join([*words_of(row.prompt), *map(mark, row.marks)])
                    db.execute(
                        "INSERT INTO rows (id, filename, content) VALUES (?, ?, ?)", (number, filename, row.content)
                    )
                    db.execute("INSERT INTO words (rowid, text) VALUES (?, ?)", (number, text))
            _remember(db, epoch, place)
        self.epoch, self.place = epoch, place

    def _clear(self, db: sqlite3.Connection, epoch: str) -> None:
        with _transaction(db):
            db.execute("DELETE FROM rows")
            db.execute("DELETE FROM words")
            _remember(db, epoch, 0)
        self.epoch, self.place = epoch, 0


def words_of(text: str) -> list[str]:
    """The words by which a text is found, in whatever case they are written."""
    return list(dict.fromkeys(_WORD.findall(text.casefold())))


def mark(field: str) -> str:
    """A field and its value as one word that no prompt has."""
    name, _, value = field.partition(":")
    return f"{name}:{value.encode().hex()}"


def _id(created_ms: int, filename: str) -> int:
    return (created_ms << _TIE_BITS) | (zlib.crc32(filename.encode()) & ((1 << _TIE_BITS) - 1))


def _free_id(db: sqlite3.Connection, created_ms: int, filename: str) -> int:
    number = _id(created_ms, filename)
    while db.execute("SELECT 1 FROM rows WHERE id = ?", (number,)).fetchone():
        number += 1
    return number


def _page(db: sqlite3.Connection, span: Span, words: Sequence[str], limit: int) -> list[Found]:
    # A time of the year 9999 is fine, and beyond what SQLite's integers hold.
    low = -1 if span.after_ms is None else min(span.after_ms << _TIE_BITS, _LAST_ID)
    high = _LAST_ID if span.before_ms is None else min(span.before_ms << _TIE_BITS, _LAST_ID)
    if span.before_ms is not None and span.before_name:
        known = db.execute("SELECT id FROM rows WHERE filename = ?", (span.before_name,)).fetchone()
        high = known[0] if known is not None else min(_id(span.before_ms, span.before_name), _LAST_ID)
    if words:
        query = " AND ".join('"' + word + '"' for word in words)
        # The index of words yields ids newest first by itself; only the rows of the page are read, in the same
        # statement: one for each row was a hundred times the chance to wait for a turn on a busy machine.
        found = db.execute(
            "SELECT filename, content FROM"
            " (SELECT rowid AS number FROM words WHERE words MATCH ? AND rowid >= ? AND rowid < ?"
            " ORDER BY rowid DESC LIMIT ?) CROSS JOIN rows ON rows.id = number ORDER BY number DESC",
            (query, low, high, limit),
        ).fetchall()
    else:
        found = db.execute(
            "SELECT filename, content FROM rows WHERE id >= ? AND id < ? ORDER BY id DESC LIMIT ?", (low, high, limit)
        ).fetchall()
    return [Found(*one) for one in found]


def _remember(db: sqlite3.Connection, epoch: str, place: int) -> None:
    db.executemany(
        "INSERT INTO meta (name, value) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value",
        [("epoch", epoch), ("place", str(place))],
    )


@contextlib.contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")
