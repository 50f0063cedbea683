"""A `high` job behind 500 older ones: who begins between its submit and its start?"""

from __future__ import annotations

from bench.day.clockwork import FITS, Clockwork, Ran, Rule
from bench.day.gpus import BY_NAME, MODELS
from bench.day.workload import DayJob
from fleet_server.domain.job import Lane, Priority

BACKLOG = 500
AT = 7_200.0
"""When it comes, in seconds; the others came at once two hours before, and are older than any boost."""


def backlog() -> list[DayJob]:
    """500 normal jobs of all models at midnight, then one of an owner nobody has heard of."""
    jobs = []
    for number in range(BACKLOG):
        model = MODELS[number % len(MODELS)]
        lane = Lane(model.name, "vision", "image_gen", model.name)
        work = 10 * model.seconds * model.speed
        jobs.append(DayJob(number, number / BACKLOG, lane, "ann", Priority.NORMAL, work, 1.0))
    return jobs


def began_before(rule: Rule, model: str, *, single: bool = False) -> int:
    """How many other jobs began on nodes that could have run the `high` one, between its submit and its start."""
    high = DayJob(
        BACKLOG, AT, Lane(model, "vision", "image_gen", model), "bob", Priority.HIGH, BY_NAME[model].speed, 1.0
    )
    day = Clockwork(rule, single=single).run([*backlog(), high])
    (own,) = [ran for ran in day.ran if ran.job is high]

    def passed(ran: Ran) -> bool:
        return ran is not own and AT <= ran.began < own.began and FITS[ran.node, model]

    return sum(passed(ran) for ran in day.ran)
