"""A day of five unequal GPUs in virtual time: ours against round robin, least busy and one queue, same filters.

`python -m bench.day [HOURS]`. Loads of 40, 70 and 95 % of what the fleet could do without ever loading a model, five
seeds each. The wait of a job is from its submit to its first step, loading included.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from statistics import median

from bench._machine import heading
from bench.day.baselines import LeastBusy, OneQueue, RoundRobin
from bench.day.clockwork import Clockwork, Day, Rule, percentile
from bench.day.gpus import GPUS, MODELS, capacity
from bench.day.ours import Ours
from bench.day.workload import LOADS, SEEDS, make

RULES: dict[str, Callable[[], Rule]] = {
    "round robin": RoundRobin,
    "least busy": LeastBusy,
    "one queue": OneQueue,
    "ours": Ours,
}
Days = dict[tuple[str, float], list[Day]]


def say(text: str = "") -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def spread(values: list[float], form: str = "{:.0f}") -> str:
    """Median and range."""
    low, middle, high = (form.format(value) for value in (min(values), median(values), max(values)))
    return f"{middle} [{low} - {high}]"


def run_days(seconds: float) -> Days:
    """Every rule on every workload."""
    return {
        (name, load): [Clockwork(rule()).run(make(load, seed, seconds)) for seed in SEEDS]
        for load in LOADS
        for name, rule in RULES.items()
    }


def row(name: str, load: float, days: list[Day]) -> str:
    """One line of the table: medians and ranges over the seeds."""
    waits, turnarounds = [day.waits() for day in days], [day.turnarounds() for day in days]
    cells = [
        f"{load:.0%}",
        name,
        *(spread([percentile(one, share) for one in waits]) for share in (0.5, 0.95, 0.99)),
        *(spread([percentile(one, share) for one in turnarounds]) for share in (0.5, 0.95)),
        spread([1000 * day.swaps / len(day.ran) for day in days]),
        spread([day.idle_seconds for day in days]),
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Prints the tables."""
    hours = float(sys.argv[1]) if len(sys.argv) > 1 else 24.0
    say(heading())
    say(
        f"{len(GPUS)} GPUs, {len(MODELS)} models, {hours:g} h, "
        f"{3600 * capacity():.0f} jobs an hour at 100 %, {len(SEEDS)} seeds"
    )
    began = time.process_time()
    days = run_days(hours * 3600)
    say()
    say(
        "| load | rule | wait s, p50 | p95 | p99 | submit to end s, p50 | p95 "
        "| loads per 1,000 jobs | GPU s idle beside a job past its load time |"
    )
    say("|---|---|---|---|---|---|---|---|---|")
    for (name, load), of in days.items():
        say(row(name, load, of))
    say()
    say(f"CPU time of all: {time.process_time() - began:.0f} s")


if __name__ == "__main__":
    main()
