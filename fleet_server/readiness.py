"""Whether the server can start, and whether it takes work now."""

from __future__ import annotations

import shutil
import time

from fleet_server.domain.errors import FleetError
from fleet_server.settings import Settings


class StartError(RuntimeError):
    """The server cannot start; the text says why and what to do."""


class Readiness:
    """Why the server takes no work now: it is stopping, or its disk is nearly full."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._checked_at = 0.0
        self._disk: FleetError | None = None
        self.stopping = False

    def refusal(self) -> FleetError | None:
        """The error for new work, None where it is welcome. The disk is looked at once a second at most."""
        if self.stopping:
            return FleetError("SHUTTING_DOWN", "the server is being shut down: come again in a moment")
        now = time.monotonic()
        if now - self._checked_at > 1:
            self._checked_at = now
            free = shutil.disk_usage(self._settings.data_dir).free
            floor = self._settings.disk_floor_bytes
            self._disk = None
            if free < floor:
                self._disk = FleetError(
                    "DISK_FULL", f"the server's disk has {free:,} bytes left of the {floor:,} that it keeps free"
                )
        return self._disk
