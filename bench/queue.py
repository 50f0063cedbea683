"""The queue, against taskiq, dramatiq, SAQ, arq, Celery and BullMQ.

    python -m bench.queue [--rounds 5] [--jobs 2000] [--only fleet,taskiq] [--fsync always,everysec] [--full]

Everyone gets the same Valkey binary on a fresh folder over loopback TCP for each run, one producer process, and one
worker with the same body: it appends 16 bytes to a file. Contenders take turns within each round, and ratios are formed
within rounds. A job's end is its acknowledgement in the queue, not its body's. Ours is the whole road: gRPC, server,
store, placement, stream, agent, slot processes, spool, end. Peers' environments are made on first use (Node.js needed).

(a) one job a call, 64 callers; (b) batches of 100, 4 callers: each by its library's own call for several, where it has
one; idle dispatch: jobs 20 ms apart, from the submit's begin to the body's. Of ours also: round trips to the store a
job (times that it read from its clients), and with --full 1,000,000 jobs queued against 10,000.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from bench._machine import heading
from bench._queue_depth import depths, trips
from bench._queue_fleet import PROMISE, fleet
from bench._queue_peers import PEERS, version
from bench._queue_run import Contender, Window, peer

OURS = "fleet"
IDLE_GAP_SECONDS = 0.02
Open = Callable[[Path, str], AbstractContextManager[Contender]]


@dataclass
class Rows:
    """What one contender did, a value a round."""

    single: list[Window] = field(default_factory=list)
    batch: list[Window] = field(default_factory=list)
    idle: list[list[float]] = field(default_factory=list)


def main() -> None:
    """Runs it and prints its tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2000, help="jobs of each window")
    parser.add_argument("--idle", type=int, default=100, help="jobs 20 ms apart, a round")
    parser.add_argument("--only", default=",".join((OURS, *PEERS)), help="contenders, parted by commas")
    parser.add_argument("--fsync", default="always,everysec", help="settings of appendfsync to run with")
    parser.add_argument("--depth", action="store_true", help="only round trips and depths, of ours")
    parser.add_argument("--full", action="store_true", help="also 1,000,000 queued against 10,000 (many minutes)")
    options = parser.parse_args()
    _say(heading() + "\n")
    if not options.depth:
        for fsync in options.fsync.split(","):
            compare(options.only.split(","), options.rounds, options.jobs, options.idle, fsync)
    if options.depth or OURS in options.only.split(","):
        with tempfile.TemporaryDirectory(prefix="fleet-bench-") as folder:
            _say(trips(Path(folder), options.jobs))
        if options.full:
            with tempfile.TemporaryDirectory(prefix="fleet-bench-") as folder:
                _say(depths(Path(folder)))


def compare(names: Sequence[str], rounds: int, jobs: int, idle: int, fsync: str) -> None:
    """Interleaved rounds of these contenders; prints the tables."""
    rows: dict[str, Rows] = defaultdict(Rows)
    allocator = ""
    for round_number in range(rounds):
        # Each round begins with another one.
        turn = round_number % len(names)
        for name in (*names[turn:], *names[:turn]):
            with (
                tempfile.TemporaryDirectory(prefix="fleet-bench-") as folder,
                _open(name)(Path(folder) / "run", fsync) as it,
            ):
                it.single(max(10, jobs // 10))
                rows[name].single.append(it.single(jobs))
                rows[name].batch.append(it.batches(jobs))
                rows[name].idle.append(it.spaced(idle, IDLE_GAP_SECONDS))
                allocator = it.store.allocator
            sys.stderr.write(f"{fsync} round {round_number + 1}: {name}\n")
    _say(f"### appendfsync {fsync}: {rounds} rounds of {jobs:,} jobs; the store's allocator: {allocator}\n\n")
    _say(_rates(rows) + "\n" + _costs(rows) + "\n" + _ratios(rows, [name for name in names if name != OURS]) + "\n")


def _open(name: str) -> Open:
    if name == OURS:
        return fleet
    if name not in PEERS:
        raise SystemExit(f"no contender named {name}; there are {OURS}, {', '.join(PEERS)}")
    return lambda folder, fsync: peer(PEERS[name], folder, fsync)


def _rates(rows: dict[str, Rows]) -> str:
    lines = ["| | (a) single jobs/s | (b) batched jobs/s | idle dispatch p50 / p99 ms | guarantee |", "|---" * 5 + "|"]
    for name, row in rows.items():
        single, batch = ([window.rate for window in windows] for windows in (row.single, row.batch))
        p50, p99 = ([_quantile(one, share) for one in row.idle] for share in (0.5, 0.99))
        who = "ours" if name == OURS else version(name)
        promise = PROMISE if name == OURS else PEERS[name].promise
        idle = f"{statistics.median(p50):.1f} / {statistics.median(p99):.1f} [{min(p99):.1f} - {max(p99):.1f}]"
        lines.append(f"| {who} | {_spread(single)} | {_spread(batch)} | {idle} | {promise} |")
    return "\n".join(lines) + "\n"


def _costs(rows: dict[str, Rows]) -> str:
    lines = ["| CPU us a job, and reads by the store | (a) | | (b) | |", "|---" * 5 + "|"]
    for name, row in rows.items():
        cells = []
        for windows in (row.single, row.batch):
            parts = {part: statistics.median(window.cpu[part] for window in windows) for part in windows[0].cpu}
            cells.append(", ".join(f"{part} {value:.0f}" for part, value in parts.items()))
            cells.append(f"{statistics.median(window.reads for window in windows):.2f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _ratios(rows: dict[str, Rows], peers: Sequence[str]) -> str:
    if OURS not in rows or not peers:
        return ""
    ours = rows[OURS]
    python = [name for name in peers if PEERS[name].python]
    lines = ["| ours / peer, by round | median [range] | target | |", "|---" * 4 + "|"]

    def add(what: str, values: Sequence[float], target: float) -> None:
        verdict = "met" if statistics.median(values) > target else "missed"
        lines.append(f"| {what} | {_spread(values, '.2f')} | > {target:g} | {verdict} |")

    if python:
        best = [max(rows[name].single[i].rate for name in python) for i in range(len(ours.single))]
        add("(a) best Python queue of the round", [w.rate / b for w, b in zip(ours.single, best, strict=True)], 1)
    if "bullmq" in peers:
        bulk = [window.rate for window in rows["bullmq"].batch]
        add("(b) BullMQ addBulk", [w.rate / b for w, b in zip(ours.batch, bulk, strict=True)], 1)
    if python:
        best = [max(rows[name].batch[i].rate for name in python) for i in range(len(ours.batch))]
        add("(b) best Python queue of the round", [w.rate / b for w, b in zip(ours.batch, best, strict=True)], 2)
    p99 = [_quantile(one, 0.99) for one in ours.idle]
    verdict = "met" if statistics.median(p99) <= 10 else "missed"
    lines.append(f"| idle dispatch p99, ms | {_spread(p99, '.1f')} | <= 10 | {verdict} |")
    return "\n".join(lines) + "\n"


def _quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[int(share * (len(values) - 1))]


def _spread(values: Sequence[float], form: str = ".0f") -> str:
    return f"{statistics.median(values):{form}} [{min(values):{form}} - {max(values):{form}}]"


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
