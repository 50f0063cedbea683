"""A day of five unequal GPUs in virtual time: ours against round robin, least busy and one queue, same filters.

`python -m bench.day [HOURS]`. Loads of 40, 70 and 95 % of what the fleet could do without ever loading a model, five
seeds each; each GPU keeps the models that fit, and once more at 70 % only one. The wait of a job is from its submit to
its first step, loading included. Exits with 1 where a GPU idled against the rule or `high` was not next.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from statistics import median

from bench._machine import heading
from bench.day.baselines import LeastBusy, OneQueue, RoundRobin
from bench.day.clockwork import Clockwork, Day, Rule, percentile
from bench.day.gpus import GPUS, MODELS, capacity
from bench.day.ours import Ours
from bench.day.urgent import BACKLOG, began_before
from bench.day.workload import LOADS, SEEDS, make

RULES: dict[str, Callable[[], Rule]] = {
    "round robin": RoundRobin,
    "least busy": LeastBusy,
    "one queue": OneQueue,
    "ours": Ours,
}
PLAIN, TARGET_LOAD = "round robin", 0.70
Key = tuple[str, float, bool]
"""Rule, load, and whether a GPU holds one model only."""


def say(text: str = "") -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def spread(values: list[float], form: str = "{:,.0f}") -> str:
    """Median and range."""
    low, middle, high = (form.format(value) for value in (min(values), median(values), max(values)))
    return f"{middle} [{low} - {high}]"


class Summary:
    """The figures of one day, small enough to come back from another process."""

    def __init__(self, day: Day) -> None:
        waits, turnarounds = day.waits(), day.turnarounds()
        self.waits = [percentile(waits, share) for share in (0.5, 0.95, 0.99)]
        self.turnarounds = [percentile(turnarounds, share) for share in (0.5, 0.95)]
        self.loads = 1000 * day.swaps / len(day.ran)
        self.idle = day.idle_seconds


def one_day(rule: str, load: float, single: bool, seed: int, seconds: float) -> Summary:
    """A day of one rule."""
    return Summary(Clockwork(RULES[rule](), single=single).run(make(load, seed, seconds)))


def run_days(seconds: float) -> dict[Key, list[Summary]]:
    """Every rule on every workload, on all cores."""
    cases = [(load, False) for load in LOADS] + [(TARGET_LOAD, True)]
    keys = [(rule, load, single) for load, single in cases for rule in RULES]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        runs = {key: [pool.submit(one_day, *key, seed, seconds) for seed in SEEDS] for key in keys}
        return {key: [run.result() for run in of] for key, of in runs.items()}


def row(rule: str, load: float, days: list[Summary]) -> str:
    """One line of the table: medians and ranges over the seeds."""
    cells = [
        f"{load:.0%}",
        rule,
        *(spread([day.waits[index] for day in days]) for index in range(3)),
        *(spread([day.turnarounds[index] for day in days]) for index in range(2)),
        spread([day.loads for day in days]),
        spread([day.idle for day in days]),
    ]
    return "| " + " | ".join(cells) + " |"


def tables(days: dict[Key, list[Summary]]) -> None:
    """One for each way to hold models."""
    for single, words in ((False, "as many models in memory as fit"), (True, "one model in memory")):
        say(f"\n{words.capitalize()}:\n")
        say(
            "| load | rule | wait s, p50 | p95 | p99 | submit to end s, p50 | p95 "
            "| loads per 1,000 jobs | GPU s idle beside a job past its load time |"
        )
        say("|---|---|---|---|---|---|---|---|---|")
        for (rule, load, one), of in days.items():
            if one is single:
                say(row(rule, load, of))


def verdict(met: bool) -> str:
    return "met" if met else "missed"


def targets(days: dict[Key, list[Summary]]) -> bool:
    """Ours against the plain rule, by seed; whether what must hold does."""
    say(f"\n| at {TARGET_LOAD:.0%}, by seed | median [range] | target | |")
    say("|---|---|---|---|")
    for single, words in ((False, "models that fit"), (True, "one model")):
        ours = days["ours", TARGET_LOAD, single]
        for name in (PLAIN, "one queue"):
            plain = days[name, TARGET_LOAD, single]
            waits = [mine.waits[1] / other.waits[1] for mine, other in zip(ours, plain, strict=True)]
            loads = [other.loads / mine.loads for mine, other in zip(ours, plain, strict=True)]
            goals = ("<= 0.7", ">= 3") if name == PLAIN else ("", "")
            say(
                f"| {words}: p95 wait, ours / {name} | {spread(waits, '{:.3f}')} | {goals[0]} "
                f"| {verdict(median(waits) <= 0.7) if goals[0] else ''} |"
            )
            say(
                f"| {words}: loads, {name} / ours | {spread(loads, '{:.2f}')} | {goals[1]} "
                f"| {verdict(median(loads) >= 3) if goals[1] else ''} |"
            )
    idle = sum(day.idle for (rule, _, _), of in days.items() if rule == "ours" for day in of)
    say(f"| ours, all loads: GPU s idle beside a job past its load time | {idle:.1f} | 0 | {verdict(idle == 0)} |")
    passed = [began_before(Ours(), model.name, single=one) for model in MODELS for one in (False, True)]
    worst = max(passed)
    say(f"| ours: jobs begun before a `high` one behind {BACKLOG} older | {worst} | 0 | {verdict(worst == 0)} |")
    return idle == 0 and worst == 0


def main() -> None:
    """Prints the tables."""
    hours = float(sys.argv[1]) if len(sys.argv) > 1 else 24.0
    say(heading())
    say(
        f"{len(GPUS)} GPUs, {len(MODELS)} models, {hours:g} h, "
        f"{3600 * capacity():.0f} jobs an hour at 100 %, {len(SEEDS)} seeds"
    )
    began = time.monotonic()
    days = run_days(hours * 3600)
    tables(days)
    kept = targets(days)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    took = time.monotonic() - began
    say(f"\n{took:.0f} s on {os.cpu_count()} cores, {used.ru_utime + used.ru_stime:.0f} s of CPU time")
    if not kept:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
