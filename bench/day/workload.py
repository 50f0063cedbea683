"""The jobs of a day: a tide, bursts of one owner who wants one model, and a drizzle of everything."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from bench.day.gpus import LORAS, MODELS, Model, capacity
from fleet_server.domain.job import Lane, Priority

T = TypeVar("T")

DAY_SECONDS = 86_400.0
LOADS = (0.40, 0.70, 0.95)
SEEDS = (1, 2, 3, 4, 5)
TIDE = 0.15
"""Arrivals are this share above the mean at the height of the day, and below it at night."""

BURST_SHARE = 0.4
"""Of all jobs come in bursts."""

BURST_JOBS = (10, 40)
BURST_SECONDS = 60.0
OWNERS = (("ann", 0.35), ("bob", 0.25), ("cem", 0.15), ("dia", 0.12), ("eva", 0.08), ("fei", 0.05))
PRIORITIES = ((Priority.NORMAL, 0.85), (Priority.HIGH, 0.05), (Priority.LOW, 0.10))
LORA_SHARE = 0.25
NOISE = 0.05
"""Runs of equal work differ by so much, up and down."""


@dataclass(frozen=True, slots=True)
class DayJob:
    """One job. `work` is in pixels x steps, `noise` a factor on its run, `at` seconds since midnight."""

    number: int
    at: float
    lane: Lane
    owner: str
    priority: Priority
    work: float
    noise: float

    @property
    def model(self) -> str:
        return self.lane.model


def make(load: float, seed: int, seconds: float = DAY_SECONDS) -> list[DayJob]:
    """The jobs of a day with so much of the fleet's capacity asked for; the same for the same arguments, for ever."""
    rng = random.Random(f"day {load:.2f} {seed}")
    rate = load * capacity()
    times: list[tuple[float, Model, str]] = []
    at = 0.0
    peak = rate * (1 - BURST_SHARE) * (1 + TIDE)
    while (at := at + rng.expovariate(peak)) < seconds:
        if rng.random() * (1 + TIDE) <= _tide(at):
            times.append((at, _model(rng), _pick(rng, OWNERS)))
    mean_jobs = sum(BURST_JOBS) / 2
    at = 0.0
    while (at := at + rng.expovariate(rate * BURST_SHARE / mean_jobs)) < seconds:
        model, owner = _model(rng), _pick(rng, OWNERS)
        jobs = rng.randint(*BURST_JOBS)
        times += [(at + rng.random() * BURST_SECONDS, model, owner) for _ in range(jobs)]
    times.sort(key=lambda one: one[0])
    return [_job(rng, number, *one) for number, one in enumerate(times) if one[0] < seconds]


def _tide(at: float) -> float:
    return 1 + TIDE * math.sin(2 * math.pi * at / DAY_SECONDS - math.pi / 2)


def _job(rng: random.Random, number: int, at: float, model: Model, owner: str) -> DayJob:
    loras = (rng.choice(LORAS),) if model.loras and rng.random() < LORA_SHARE else ()
    lane = Lane("/".join((model.name, *loras)), "vision", "image_gen", model.name, loras)
    # Halves and doubles of the usual size; the mean is the usual one.
    work = model.seconds * model.speed * rng.choice((0.5, 0.75, 1.0, 1.0, 1.75))
    noise = 1 + rng.uniform(-NOISE, NOISE)
    return DayJob(number, at, lane, owner, _pick(rng, PRIORITIES), work, noise)


def _model(rng: random.Random) -> Model:
    return _pick(rng, [(model, model.share) for model in MODELS])


def _pick(rng: random.Random, shares: Sequence[tuple[T, float]]) -> T:
    values, weights = zip(*shares, strict=True)
    chosen: T = rng.choices(values, weights)[0]
    return chosen
