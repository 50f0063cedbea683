"""A spool in memory: what a crash of a simulated agent leaves behind lives as long as the simulation."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from fleet.v1 import node_pb2

from fleet_agent.spool import Spool, SpooledFile, SpoolEntry


class MemorySpool(Spool):
    """A Spool without fsync: its entries are objects, its files lie in the attempt's work folder. `forgotten(token)` is
    called for each end that is not kept any longer.
    """

    def __init__(self, folder: Path, forgotten: Callable[[str], None]) -> None:
        self._folder = folder
        self._forgotten = forgotten
        self._kept: dict[str, SpoolEntry] = {}

    def work_folder(self, token: str) -> Path:
        """Where outputs may go; made by who writes one."""
        return self._folder / token

    def discard(self, token: str) -> None:
        self._remove_files(token)

    def stage(self, complete: node_pb2.JobComplete, outputs: Sequence[tuple[Path, str]]) -> SpoolEntry:
        files = []
        for path, content_type in outputs:
            data = path.read_bytes()
            files.append(SpooledFile(path.name, content_type, len(data), hashlib.sha256(data).hexdigest()))
        return SpoolEntry(self.work_folder(complete.token), complete, tuple(files))

    def commit(self, entry: SpoolEntry) -> None:
        self._kept[entry.token] = entry

    async def keep(self, complete: node_pb2.JobComplete) -> SpoolEntry:
        return self.add(complete, ())

    def forget(self, token: str) -> bool:
        self.remove(token)
        self._forgotten(token)
        return True

    async def aclose(self) -> None:
        """Nothing is open."""

    def entries(self) -> list[SpoolEntry]:
        return list(self._kept.values())

    def remove(self, token: str) -> None:
        entry = self._kept.pop(token, None)
        if entry is not None and entry.files:
            self._remove_files(token)

    def _remove_files(self, token: str) -> None:
        shutil.rmtree(self.work_folder(token), ignore_errors=True)
