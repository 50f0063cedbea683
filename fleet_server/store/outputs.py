"""The index of outputs, newest first. Rows are written by JobStore.complete."""

from __future__ import annotations

from fleet_server.store.records import OutputRow, PageKey


class OutputStore:
    async def get(self, filename: str) -> OutputRow | None:
        raise NotImplementedError

    async def list(
        self, *, before: PageKey | None = None, limit: int = 100
    ) -> tuple[list[OutputRow], PageKey | None]:
        """All outputs, newest first; the key of the next page is None at the end."""
        raise NotImplementedError

    async def by_job(self, job_id: str) -> list[OutputRow]:
        """A job's outputs in the order in which it made them."""
        raise NotImplementedError

    async def put(self, row: OutputRow) -> None:
        """Adds or replaces a row (found on disk, rebuilt index)."""
        raise NotImplementedError

    async def update(self, filename: str, record: bytes) -> OutputRow | None:
        """Replaces the record of a row that is there (starred, moved, checked); the row afterwards."""
        raise NotImplementedError

    async def delete(self, filename: str) -> OutputRow | None:
        """Removes a row; as it was, None if unknown."""
        raise NotImplementedError
