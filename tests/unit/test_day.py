"""A part of the day of five GPUs: the rules of placement over the very functions that dispatch calls."""

from __future__ import annotations

import hashlib

import pytest

from bench.day.baselines import LeastBusy, OneQueue, RoundRobin
from bench.day.clockwork import Clockwork, Day, Rule, percentile
from bench.day.gpus import MODELS
from bench.day.ours import Ours
from bench.day.urgent import began_before
from bench.day.workload import LOADS, SEEDS, make

HOURS = 3


def day_of(rule: Rule, load: float = 0.7, seed: int = 1, *, single: bool = False) -> Day:
    return Clockwork(rule, single=single).run(make(load, seed, HOURS * 3600))


def test_the_workloads_are_those_that_were_committed_before_tuning() -> None:
    """Figures of two days can only be compared if the days are the same."""
    digest = hashlib.sha256()
    for load in LOADS:
        for seed in SEEDS:
            for job in make(load, seed, 3600):
                line = (
                    job.number,
                    round(job.at, 6),
                    job.lane.lane_id,
                    job.owner,
                    job.priority,
                    round(job.work),
                    round(job.noise, 9),
                )
                digest.update(repr(line).encode())
    assert digest.hexdigest()[:16] == "d98ee97c65a56379"


@pytest.mark.parametrize("single", [False, True])
def test_every_job_ends_once_and_no_gpu_idles_beside_a_job_past_its_load_time(single: bool) -> None:
    jobs = make(0.7, 1, HOURS * 3600)
    day = day_of(Ours(), single=single)
    assert sorted(ran.job.number for ran in day.ran) == [job.number for job in jobs]
    assert day.idle_seconds == 0


def test_waits_are_shorter_and_loads_fewer_than_by_the_simple_rules() -> None:
    ours, plain = day_of(Ours()), day_of(RoundRobin())
    assert percentile(ours.waits(), 0.95) <= 0.7 * percentile(plain.waits(), 0.95)
    for rule in (plain, day_of(LeastBusy()), day_of(OneQueue())):
        assert ours.swaps < 0.85 * rule.swaps


def test_the_count_of_idle_gpus_bites() -> None:
    """Lines that jobs cannot leave make GPUs idle beside waiting jobs."""
    assert day_of(RoundRobin()).idle_seconds > 1_000


@pytest.mark.parametrize("model", [MODELS[0].name, MODELS[-1].name])
def test_a_high_job_behind_500_older_ones_is_next(model: str) -> None:
    assert began_before(Ours(), model) == 0
    assert began_before(OneQueue(), model) > 100
