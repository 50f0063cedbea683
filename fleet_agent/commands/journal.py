"""Which commands have been begun here and how they ended, on the disk before the first of it can be seen.

An SQLite file in the agent's folder: a command is written down before it takes effect and again when it has ended, each
time with an fsync for all that came meanwhile. Entries are kept for 24 hours, the newest 100,000 at most, and of their
results the newest 64 MiB.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from fleet.v1 import command_pb2

from fleet_agent.commands.faults import unknown

_SCHEMA = """
CREATE TABLE IF NOT EXISTS commands (
    command_id TEXT PRIMARY KEY, begun INTEGER NOT NULL, ended INTEGER, size INTEGER NOT NULL DEFAULT 0, result BLOB
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_age ON commands (begun);
"""
T = TypeVar("T")
Work = Callable[[sqlite3.Connection], T]


class CommandJournal:
    """`open` first. Each change is on the disk when its call returns. Calls raise OSError where the disk refuses."""

    def __init__(
        self,
        path: Path,
        *,
        keep_seconds: float = 86_400,
        keep_entries: int = 100_000,
        keep_bytes: int = 64 << 20,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._path = path
        self._keep_seconds = keep_seconds
        self._keep_entries = keep_entries
        self._keep_bytes = keep_bytes
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="command-journal")
        self._file: sqlite3.Connection | None = None
        self._waiting: list[tuple[Work[object], asyncio.Future[object]]] = []
        self._writer: asyncio.Task[None] | None = None
        self._bytes = 0
        self._tidied = 0.0

    async def open(self) -> list[str]:
        """The ids of commands that an earlier process began and did not end: their outcome is unknown from now on."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._open)

    async def begin(self, command_id: str) -> command_pb2.CommandEnd | None:
        """Writes down that the command begins: None. The end of one that was begun before."""
        return await self._do(lambda file: self._begin(file, command_id))

    async def end(self, command_id: str, end: command_pb2.CommandEnd) -> None:
        """Writes down how it ended."""
        data = end.SerializeToString()
        await self._do(lambda file: self._end(file, command_id, data))

    async def forget(self, command_id: str) -> None:
        """It changed nothing: it may be tried again."""
        await self._do(lambda file: file.execute("DELETE FROM commands WHERE command_id = ?", (command_id,)))

    async def aclose(self) -> None:
        """Writes what waits, and closes the file."""
        if self._writer is not None:
            await asyncio.wait([self._writer])
        if self._file is not None:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._file.close)
            self._file = None
        self._thread.shutdown(wait=False)

    # On the loop.

    async def _do(self, work: Work[T]) -> T:
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.append((work, done))  # type: ignore[arg-type]  # each future takes what its own work gives
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write(), name="command-journal")
        return await done

    async def _write(self) -> None:
        """One transaction after the other, each with all that waits."""
        loop = asyncio.get_running_loop()
        while self._waiting:
            batch, self._waiting = self._waiting, []
            try:
                results = await loop.run_in_executor(self._thread, self._apply, [work for work, _ in batch])
            except sqlite3.Error as error:
                for _, done in batch:
                    if not done.done():
                        done.set_exception(OSError(f"{self._path}: {error}"))
                continue
            for (_, done), result in zip(batch, results, strict=True):
                if not done.done():
                    done.set_result(result)

    # On the thread.

    def _open(self) -> list[str]:
        try:
            file = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
            self._path.chmod(0o600)
            file.execute("PRAGMA journal_mode=WAL")
            file.execute("PRAGMA synchronous=FULL")
            file.executescript(_SCHEMA)
            rows = file.execute("SELECT command_id FROM commands WHERE ended IS NULL").fetchall()
            lost = unknown("the agent was restarted while it had the command").end.SerializeToString()
            now = int(self._clock())
            file.execute(
                "UPDATE commands SET ended = ?, result = ?, size = ? WHERE ended IS NULL", (now, lost, len(lost))
            )
            self._file = file
            self._tidy(file)
        except sqlite3.Error as error:
            raise OSError(f"{self._path}: {error}") from error
        return [row[0] for row in rows]

    def _apply(self, works: list[Work[object]]) -> list[object]:
        file = self._file
        if file is None:
            raise sqlite3.OperationalError("the journal is not open")
        file.execute("BEGIN IMMEDIATE")
        try:
            results = [work(file) for work in works]
            if self._bytes > self._keep_bytes or self._clock() - self._tidied > 60:
                self._tidy(file)
            file.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                file.execute("ROLLBACK")
            raise
        return results

    def _begin(self, file: sqlite3.Connection, command_id: str) -> command_pb2.CommandEnd | None:
        row = file.execute("SELECT ended, result FROM commands WHERE command_id = ?", (command_id,)).fetchone()
        if row is None:
            file.execute("INSERT INTO commands (command_id, begun) VALUES (?, ?)", (command_id, int(self._clock())))
            return None
        ended, result = row
        if ended is None:
            return unknown("the command was begun before and has not ended").end
        if result is None:
            return unknown("the command ended, but its result is kept no more").end
        return command_pb2.CommandEnd.FromString(result)

    def _end(self, file: sqlite3.Connection, command_id: str, data: bytes) -> None:
        file.execute(
            "UPDATE commands SET ended = ?, result = ?, size = ? WHERE command_id = ?",
            (int(self._clock()), data, len(data), command_id),
        )
        self._bytes += len(data)

    def _tidy(self, file: sqlite3.Connection) -> None:
        """Forgets what is old; of what is kept beyond the bound, the oldest."""
        self._tidied = self._clock()
        file.execute("DELETE FROM commands WHERE begun < ?", (int(self._tidied - self._keep_seconds),))
        (count,) = file.execute("SELECT count(*) FROM commands").fetchone()
        if count > self._keep_entries:
            oldest = "SELECT command_id FROM commands WHERE ended IS NOT NULL ORDER BY begun LIMIT ?"
            file.execute(f"DELETE FROM commands WHERE command_id IN ({oldest})", (count - self._keep_entries,))
        sizes = file.execute(
            "SELECT command_id, size FROM commands WHERE size > 0 ORDER BY begun DESC, command_id DESC"
        )
        total, emptied = 0, []
        for command_id, size in sizes.fetchall():
            total += size
            if total > self._keep_bytes // 2:
                emptied.append((command_id,))
        if self._bytes > self._keep_bytes or total > self._keep_bytes:
            file.executemany("UPDATE commands SET result = NULL, size = 0 WHERE command_id = ?", emptied)
            total = min(total, self._keep_bytes // 2)
        self._bytes = total
