"""Bars for long operations of the fleet: told by its events while the call that began them waits."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from typing import Any, TypeVar

from rich.progress import BarColumn, Progress, TaskID, TextColumn

from fleet_client.calls import Json
from fleet_client.cli.console import err
from fleet_client.cli.words import plain, size
from fleet_client.client import FleetCommander
from fleet_client.errors import FleetError

T = TypeVar("T")


def with_bars(fleet: FleetCommander, work: Callable[[str], T]) -> T:
    """What `work(request_id)` gives; meanwhile, on a terminal, a bar for each part of it that the fleet tells of."""
    request_id = str(uuid.uuid4())
    if not err.is_terminal:
        return work(request_id)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %  {task.fields[told]}"),
    )
    with Progress(*columns, console=err, transient=True) as progress:
        bars = _Bars(fleet, request_id, progress)
        # A daemon: a stream that is silent is not waited for.
        threading.Thread(target=bars.follow, name="bars", daemon=True).start()
        try:
            return work(request_id)
        finally:
            bars.over = True


class _Bars:
    def __init__(self, fleet: FleetCommander, request_id: str, progress: Progress) -> None:
        self._fleet = fleet
        self._request_id = request_id
        self._progress = progress
        self._tasks: dict[tuple[Any, Any], TaskID] = {}
        self.over = False

    def follow(self) -> None:
        """Until the work is over, or the server tells nothing more."""
        try:
            for event in self._fleet.watch_events(type="operation_progress"):
                if self.over:
                    return
                if event["data"].get("request_id") == self._request_id:
                    self._show(event["data"])
        except (FleetError, RuntimeError):
            # Bars are a comfort: the work says itself how it ended. (RuntimeError: the client was closed.)
            return

    def _show(self, data: Json) -> None:
        key = data["node_id"], data["name"]
        if key not in self._tasks:
            words = " on ".join(plain(part) for part in (data["name"], data["node_id"]) if part)
            self._tasks[key] = self._progress.add_task(words, total=100, told="")
        told = plain(data["message"] or "")
        if data["total_bytes"]:
            told = f"{size(data['done_bytes'])} of {size(data['total_bytes'])}"
        self._progress.update(self._tasks[key], completed=data["progress"], told=told)
