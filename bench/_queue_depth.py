"""Of ours alone: round trips to the store a job at depths 1 and 1,000; 1,000,000 queued jobs against 10,000."""

from __future__ import annotations

import time
from pathlib import Path

from bench._queue_fleet import fleet
from bench._queue_run import Contender

_FEW, _MANY = 10_000, 1_000_000
_WINDOW = 5_000
_WARM_UP = 1_000


def trips(folder: Path, jobs: int) -> str:
    """The table of round trips: the server's idle questions are in it, the benchmark's own are not."""
    alone, deep = min(200, jobs), min(1_000, 10 * jobs)
    with fleet(folder / "trips", "always") as it:
        it.single(50)
        one = it.one_by_one(alone)
        with it.stopped("agent"):
            it.batches(deep, wait=False)
            before, start = it.reading(), time.monotonic_ns()
        it.await_left()
        many = it.cost(deep, before, start)
        allocator = it.store.allocator
    lines = ["| depth | round trips a job | store CPU us a job | target | |", "|---" * 5 + "|"]
    for depth, window, target in ((1, one, 3.0), (deep, many, 0.2)):
        verdict = "met" if window.reads <= target else "missed"
        lines.append(f"| {depth:,} | {window.reads:.2f} | {window.cpu['store']:.0f} | <= {target:g} | {verdict} |")
    note = f"At depth 1 with its submit; at the other from the claims on. The store's allocator: {allocator}.\n"
    return "\n".join([*lines, "", note])


def depths(folder: Path) -> str:
    """The table of depths: so many jobs wait, then 5,000 of them run."""
    lines = ["| queued | dispatch jobs/s | store CPU us a job | bytes a job |", "|---" * 4 + "|"]
    found = []
    for count in (_FEW, _MANY):
        with fleet(folder / str(count), "everysec") as it:
            rate, cpu, size = _depth(it, count)
            allocator = it.store.allocator
        found.append((rate, cpu))
        lines.append(f"| {count:,} | {rate:.0f} | {cpu:.0f} | {size:,.0f} |")
    (few_rate, few_cpu), (many_rate, many_cpu) = found
    slower, dearer = 1 - many_rate / few_rate, many_cpu / few_cpu - 1
    verdicts = ["met" if value <= most else "missed" for value, most in ((slower, 0.25), (dearer, 0.15))]
    rate_text = f"{slower:.0%} slower (target 25 %, {verdicts[0]})"
    lines.append(f"\n{rate_text}, {dearer:.0%} more store CPU (target 15 %, {verdicts[1]})")
    lines.append(f"The store's allocator: {allocator}.\n")
    return "\n".join(lines)


def _depth(it: Contender, count: int) -> tuple[float, float, float]:
    it.single(100)
    with it.stopped("agent"):
        empty = it.store.reading().used_bytes
        it.batches(count, wait=False)
        it.store.await_rewrite()
        size = (it.store.reading().used_bytes - empty) / count
    # The agent may have to dial again first.
    begun = it.submitted - count + _WARM_UP
    it.await_marks(begun)
    before, start = it.reading(), time.monotonic_ns()
    it.await_marks(begun + _WINDOW)
    window = it.cost(_WINDOW, before, start)
    return window.rate, window.cpu["store"], size
