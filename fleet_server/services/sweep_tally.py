"""What a sync, cleanup or move has done so far: counted as it goes, told to those who listen, summed up at its end."""

from __future__ import annotations

import time
from collections.abc import Callable

from fleet.v1 import types_pb2

from fleet_server.domain.errors import FleetError

SHOWN = 1_000
"""Names, and failures, that a summary holds."""

_PAUSE_SECONDS = 0.25


class Tally:
    """Each file scanned is done, skipped or failed: exactly one call for each after `scan`.

    `tell` is called with progress now and then, and at the end; `total` is how many files there are to look at.
    """

    def __init__(
        self,
        operation: str,
        *,
        clock: Callable[[], int],
        tell: Callable[[types_pb2.OperationProgress], None] = lambda _: None,
        request_id: str | None = None,
        dry_run: bool = False,
    ) -> None:
        self._sweep = types_pb2.Sweep(operation=operation, dry_run=dry_run)
        self._sweep.start_time.FromMilliseconds(clock())
        self._clock = clock
        self._tell = tell
        self._request_id = request_id
        self._told = 0.0
        self._failed: set[str] = set()
        self.total = 0
        self.total_bytes = 0

    @property
    def dry_run(self) -> bool:
        return self._sweep.dry_run

    def uploaded(self, filename: str, size: int, *, last: bool = True) -> None:
        """The bucket has the file now. `last`: that is all that was to be done with it."""
        self._sweep.uploaded += 1
        self._sweep.uploaded_bytes += size
        if last:
            self._name(filename)

    def deleted(self, filename: str, size: int) -> None:
        """The local file is gone; in a dry run: would be."""
        self._sweep.deleted += 1
        self._sweep.deleted_bytes += size
        self._name(filename)

    def skipped(self, files: int = 1) -> None:
        """Left as they were."""
        self._sweep.scanned += files
        self._sweep.skipped += files
        self._progress()

    def passed_by(self, filename: str) -> None:
        """Left as it was, unless an earlier step has counted it as failed."""
        if filename not in self._failed:
            self.skipped()

    def failed(self, filename: str, error: FleetError) -> None:
        """It could not be done."""
        self._failed.add(filename)
        self._sweep.scanned += 1
        self._sweep.failed += 1
        if len(self._sweep.failures) < SHOWN:
            self._sweep.failures.add(filename=filename, reason=error.reason, detail=error.detail)
        self._progress()

    def end(self) -> types_pb2.Sweep:
        """The summary."""
        self._sweep.end_time.FromMilliseconds(self._clock())
        self._tell(self._message(100))
        return self._sweep

    def _name(self, filename: str) -> None:
        self._sweep.scanned += 1
        if len(self._sweep.filenames) < SHOWN:
            self._sweep.filenames.append(filename)
        self._progress()

    def _progress(self) -> None:
        now = time.monotonic()
        if now - self._told < _PAUSE_SECONDS:
            return
        self._told = now
        share = self._sweep.scanned / self.total if self.total else 0
        self._tell(self._message(min(99, int(100 * share))))

    def _message(self, progress: int) -> types_pb2.OperationProgress:
        sweep = self._sweep
        words = f"{sweep.scanned} of {max(self.total, sweep.scanned)} files"
        if sweep.failed:
            words += f", {sweep.failed} failed"
        return types_pb2.OperationProgress(
            operation=sweep.operation,
            request_id=self._request_id,
            progress=progress,
            message=words,
            done_bytes=sweep.deleted_bytes or sweep.uploaded_bytes,
            total_bytes=self.total_bytes or None,
        )
