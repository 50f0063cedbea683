"""The tally tells what the server must never do from what a cut-off node brings about."""

from __future__ import annotations

import pytest
from fleet.v1 import node_pb2, types_pb2

from fleet_agent.simulation.profiles import GPUS, NodePlan
from fleet_agent.simulation.summary import peak_rate, percentile
from fleet_agent.simulation.tally import Tally

PLAN = NodePlan("a", GPUS["rtx-3090"], ())
Outcome = node_pb2.CompleteOutcome


@pytest.fixture
def tally() -> Tally:
    tally = Tally()
    for name in ("a", "b"):
        tally.planned(PLAN)
        tally.online(name, 0.0)
    return tally


def assign(token: str, job_id: str = "j1", generation: int = 1) -> node_pb2.Assign:
    return node_pb2.Assign(
        job_id=job_id, token=token, generation=generation, attempt=1, job_type=types_pb2.JOB_TYPE_CUSTOM
    )


def ack(token: str, outcome: Outcome.ValueType = Outcome.COMPLETE_OUTCOME_OK) -> node_pb2.CompleteAck:
    return node_pb2.CompleteAck(job_id="j1", token=token, outcome=outcome)


def test_a_job_is_counted_from_submit_to_end(tally: Tally) -> None:
    tally.assigned(assign("t1"), "a", 10.0)
    tally.accepted("j1", 9.5)
    assert (tally.running, tally.unfinished) == (1, 1)
    tally.worked(PLAN, "t1", 2.0, 1.0, True)
    tally.acknowledged(ack("t1"), "a", 12.0)
    assert (tally.done, tally.running, tally.unfinished) == (1, 0, 0)
    assert tally.dispatch == [0.5] and tally.turnaround == [2.5]
    one = tally.by_class["rtx-3090"]
    assert (one.busy, one.loading, one.swaps, one.jobs) == (2.0, 1.0, 1, 1)


def test_an_end_before_the_reply_to_its_submit_is_counted_all_the_same(tally: Tally) -> None:
    tally.assigned(assign("t1"), "a", 10.0)
    tally.worked(PLAN, "t1", 2.0, 1.0, True)
    tally.acknowledged(ack("t1"), "a", 12.0)
    tally.accepted("j1", 9.5)
    assert (tally.done, tally.submitted, tally.unfinished) == (1, 1, 0)
    assert tally.dispatch == [0.5] and tally.turnaround == [2.5]


def test_an_end_that_was_taken_without_an_answer_is_asked_for(tally: Tally) -> None:
    tally.accepted("j1", 9.5)
    tally.assigned(assign("t1"), "a", 10.0)
    tally.forgotten("t1")
    assert (tally.running, tally.unfinished, tally.doubtful) == (0, 1, {"j1"})
    for _ in range(2):
        tally.found_succeeded("j1", 1, 12.0)
    assert (tally.done, tally.unfinished, tally.done_twice) == (1, 0, 0)


def test_a_success_that_an_agent_will_hear_of_is_counted_then(tally: Tally) -> None:
    tally.accepted("j1", 9.5)
    tally.assigned(assign("t1"), "a", 10.0)
    tally.worked(PLAN, "t1", 2.0, 1.0, True)
    tally.found_succeeded("j1", 1, 12.0)
    assert tally.done == 0
    tally.acknowledged(ack("t1"), "a", 12.0)
    tally.forgotten("t1")
    assert (tally.done, tally.done_twice, tally.doubtful) == (1, 0, set())


def test_two_connected_nodes_with_one_job_are_an_overlap(tally: Tally) -> None:
    tally.assigned(assign("t1"), "a", 1.0)
    tally.assigned(assign("t1"), "a", 1.1)
    assert tally.overlaps == 0
    tally.assigned(assign("t2"), "b", 2.0)
    assert (tally.overlaps, tally.overlaps_away) == (1, 0)


def test_a_node_that_is_away_or_was_told_to_stop_is_no_overlap(tally: Tally) -> None:
    tally.assigned(assign("t1"), "a", 1.0)
    tally.offline("a", 2.0)
    tally.assigned(assign("t2"), "b", 40.0)
    assert (tally.overlaps, tally.overlaps_away) == (0, 1)
    tally.cancelled("t1")
    tally.cancelled("t2")
    tally.assigned(assign("t3"), "b", 41.0)
    assert (tally.overlaps, tally.overlaps_away) == (0, 1)


def test_a_failed_attempt_and_the_success_after_it_are_one_success(tally: Tally) -> None:
    tally.assigned(assign("t1"), "a", 1.0)
    tally.worked(PLAN, "t1", 1.0, 0.0, False)
    tally.acknowledged(ack("t1"), "a", 2.0)
    assert tally.doubtful == {"j1"}
    tally.assigned(assign("t2"), "b", 3.0)
    tally.worked(PLAN, "t2", 1.0, 0.0, True)
    tally.acknowledged(ack("t2"), "b", 4.0)
    assert (tally.done, tally.failed_attempts, tally.done_twice, tally.overlaps) == (1, 1, 0, 0)


def test_two_successes_of_one_generation_are_seen(tally: Tally) -> None:
    for token, generation in (("t1", 1), ("t2", 1), ("t3", 2)):
        tally.assigned(assign(token, generation=generation), "a", 1.0)
        tally.worked(PLAN, token, 1.0, 0.0, True)
        tally.acknowledged(ack(token), "a", 2.0)
    assert (tally.done, tally.done_twice) == (3, 1)


def test_a_late_end_that_is_refused_is_no_success(tally: Tally) -> None:
    tally.assigned(assign("t1"), "a", 1.0)
    tally.worked(PLAN, "t1", 1.0, 0.0, True)
    tally.acknowledged(ack("t1", Outcome.COMPLETE_OUTCOME_REFUSED), "a", 2.0)
    assert (tally.done, tally.refused_ends) == (0, 1)


def test_only_attempts_of_nodes_that_were_there_are_healthy(tally: Tally) -> None:
    tally.assigned(assign("t1"), "a", 1.0)
    tally.offline("a", 2.0)
    tally.killed(["t1"], "a", 50.0)
    assert (tally.kills, tally.healthy_kills) == (1, 0)
    tally.online("a", 50.5)
    tally.assigned(assign("t2", "j2"), "a", 51.0)
    tally.offline("a", 52.0)
    tally.killed(["t2", "unknown"], "a", 55.0)
    assert (tally.kills, tally.healthy_kills) == (2, 1)
    tally.assigned(assign("t3", "j3"), "b", 1.0)
    tally.dropped(["t3"], "b")
    assert (tally.drops, tally.healthy_kills) == (1, 2)


def test_a_crash_loses_what_ran_and_nothing_else(tally: Tally) -> None:
    tally.assigned(assign("t1"), "a", 1.0)
    tally.assigned(assign("t2", "j2"), "b", 1.0)
    tally.crashed("a")
    assert tally.running == 1
    tally.assigned(assign("t3"), "b", 2.0)
    assert tally.overlaps == tally.overlaps_away == 0


async def test_all_online_is_told(tally: Tally) -> None:
    assert tally.all_online.is_set()
    tally.offline("a", 1.0)
    assert tally.someone_offline.is_set() and not tally.all_online.is_set()
    tally.online("a", 2.0)
    await tally.all_online.wait()


def test_percentiles_and_peaks() -> None:
    values = [float(value) for value in range(1, 101)]
    assert (percentile(values, 0.5), percentile(values, 0.99), percentile([], 0.5)) == (51.0, 100.0, None)
    assert peak_rate([0.1, 0.2, 0.9, 1.1], 1.0) == 3.0
    assert peak_rate([0.1, 0.2, 0.9, 1.1], 0.5) == 4.0
