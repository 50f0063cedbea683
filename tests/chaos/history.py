"""What callers, engines and the server's own record say of one run. Written as it happens, judged afterwards."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any


class Outcome(StrEnum):
    """How a call ended for its caller. `UNKNOWN`: no answer came, it may or may not have taken effect."""

    OK = "ok"
    REFUSED = "refused"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the client. `what`: submit, cancel, retry or get. Times are monotonic seconds."""

    what: str
    job_id: str
    request_id: str
    began: float
    ended: float
    outcome: Outcome
    status: int
    reply: Any


@dataclass(frozen=True, slots=True)
class Run:
    """One run of an engine. `ended`: its last sign of life, where it was killed."""

    job_id: str
    run_id: str
    node_id: str
    began: float
    ended: float


@dataclass(slots=True)
class History:
    """One run of the test. `jobs`, `events`, `outputs` are read when all is over.

    `outputs` maps a filename to its bytes as text, `gallery` is every row of the gallery, `seen` counts what passed
    between agents and server, `done` the faults, `late` the late reports by what they met, `taken` those that were
    taken and must not be. `assigned` is each attempt as it passed on its way down: job, generation, number, node.
    """

    seed: int
    calls: list[Call] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    outputs: dict[str, str] = field(default_factory=dict)
    gallery: list[dict[str, Any]] = field(default_factory=list)
    hooks: list[dict[str, Any]] = field(default_factory=list)
    forged: list[str] = field(default_factory=list)
    seen: dict[str, int] = field(default_factory=dict)
    done: dict[str, int] = field(default_factory=dict)
    late: dict[str, int] = field(default_factory=dict)
    taken: list[str] = field(default_factory=list)
    assigned: list[tuple[str, int, int, str]] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)

    def submitted(self) -> dict[str, list[str]]:
        """request_id -> the job ids of each acknowledged submit under it."""
        found: dict[str, list[str]] = {}
        for call in self.calls:
            if call.what == "submit" and call.outcome is Outcome.OK:
                ids = [receipt["job_id"] for receipt in call.reply["jobs"]]
                found.setdefault(call.request_id, []).append(",".join(ids))
        return found

    def accepted(self) -> set[str]:
        """Every job whose submit was acknowledged."""
        return {job_id for replies in self.submitted().values() for ids in replies for job_id in ids.split(",")}

    def save(self, path: Path) -> None:
        """As JSON, for whoever looks into a violation."""
        path.write_text(json.dumps(asdict(self), indent=1))


def read_runs(path: Path) -> list[Run]:
    """The runs that the engines wrote down, by their beginning."""
    began: dict[str, tuple[str, str, float]] = {}
    ended: dict[str, float] = {}
    for line in path.read_text().splitlines():
        what, job_id, run_id, node_id, at = line.split()
        if what == "start":
            began[run_id] = job_id, node_id, float(at)
        ended[run_id] = float(at)
    runs = [Run(job_id, run_id, node_id, at, ended[run_id]) for run_id, (job_id, node_id, at) in began.items()]
    return sorted(runs, key=lambda run: run.began)


def now() -> float:
    """The clock of calls and runs."""
    return time.monotonic()
