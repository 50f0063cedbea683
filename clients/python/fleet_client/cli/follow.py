"""Shows how a job goes on: a bar and the picture in the making on a terminal, a line for each change elsewhere."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fleet_client.calls import Json
from fleet_client.cli.console import err, say
from fleet_client.cli.picture import can_show, draw
from fleet_client.cli.words import percent, place, plain, seconds
from fleet_client.client import FleetCommander
from fleet_client.errors import JobFailedError
from fleet_client.events import Event

_BAR_COLUMNS = 40


class View(Protocol):
    """Where the course of a job is shown."""

    @property
    def previews(self) -> bool:
        """Whether pictures in the making can be shown."""

    def update(self, event: Event) -> None:
        """Something happened to the job."""


class Lines:
    """For logs and pipes: a line where the state changes, none for progress."""

    previews = False

    def __init__(self) -> None:
        self._last = ""

    def update(self, event: Event) -> None:
        if event["type"] in ("job_update", "job_complete"):
            line = f"job {event['data']['job_id']}: {place(event['data'])}"
            if line != self._last:
                say(line)
            self._last = line


class Screen:
    """For terminals: what is, a bar, the time; above them the picture in the making."""

    def __init__(self, live: Live, console: Console, previews: bool) -> None:
        self.previews = previews
        self._live = live
        self._console = console
        self._begun = time.monotonic()
        self._done = 0
        self._words = "queued"
        self._eta: float | None = None
        self._picture: RenderableType | None = None

    def update(self, event: Event) -> None:
        data = event["data"]
        if event["type"] == "job_progress":
            self._words = f"step {data['step']} of {data['steps']}" if data["steps"] else "running"
            if data["preview"] is not None:
                self._picture = draw(base64.b64decode(data["preview"]["data"]), self._console, spare_rows=3)
        elif event["type"] in ("job_update", "job_complete"):
            self._words = place(data)
        if "progress" in data:
            self._done, self._eta = data["progress"], data.get("eta_seconds")
        self._live.update(self)

    def __rich__(self) -> RenderableType:
        line = Table.grid(padding=(0, 2, 0, 0))
        line.add_row(
            Text(plain(self._words), no_wrap=True),
            ProgressBar(
                total=100,
                completed=self._done,
                width=min(_BAR_COLUMNS, max(10, self._console.width // 3)),
                complete_style="cyan",
                finished_style="green",
            ),
            Text(percent(self._done).rjust(5)),
            Text(seconds(time.monotonic() - self._begun), style="bright_black"),
            Text(f"{seconds(self._eta)} left" if self._eta else "", style="bright_black"),
        )
        return line if self._picture is None else Group(self._picture, line)


@contextmanager
def view(*, preview: bool) -> Iterator[View]:
    """The view that suits standard error."""
    if not err.is_terminal:
        yield Lines()
        return
    with Live(console=err, refresh_per_second=5, transient=True) as live:
        yield Screen(live, err, preview and can_show(err))


def follow(
    fleet: FleetCommander,
    job_id: str,
    *,
    preview: bool = False,
    timeout_seconds: float | None = None,
    also: Callable[[Event], None] | None = None,
) -> Json:
    """Shows the job until it has ended, or hands its events to `also` instead; the job. Raises JobFailedError where it
    ended badly, WaitTimeoutError where it has not ended in time."""
    job: Json = {}
    if also is not None:
        for event in fleet.watch_job(job_id, timeout_seconds=timeout_seconds):
            also(event)
            job = event["data"]
    else:
        with view(preview=preview) as shown:
            for event in fleet.watch_job(job_id, previews=shown.previews, timeout_seconds=timeout_seconds):
                shown.update(event)
                job = event["data"]
    if job["status"] != "succeeded":
        raise JobFailedError(job)
    return job
