"""The checker sees each broken promise: a history in which all were kept, broken in one place at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from tests.chaos.checker import violations
from tests.chaos.history import Call, History, Outcome, Run

JOB, OTHER = "job-1", "job-2"


def job(job_id: str, status: str = "succeeded", **more: Any) -> dict[str, Any]:
    outputs = [{"filename": f"{job_id}.png"}] if status == "succeeded" else []
    return {
        "job_id": job_id,
        "status": status,
        "generation": 1,
        "version": 3,
        "max_retries": 0,
        "exclusive": False,
        "node_id": "a",
        "callback_url": None,
        "attempts": [],
        "result": {"outputs": outputs},
        **more,
    }


def call(what: str, job_id: str, reply: Any, *, request_id: str = "", outcome: Outcome = Outcome.OK) -> Call:
    return Call(what, job_id, request_id, 1.0, 2.0, outcome, 200, reply)


def update(job_id: str, version: int) -> dict[str, Any]:
    return {"type": "job_update", "data": job(job_id, "running", version=version)}


def end(job_id: str, status: str = "succeeded", **more: Any) -> dict[str, Any]:
    return {"type": "job_complete", "data": job(job_id, status, **more)}


def attempt(number: int, reason: str, node_id: str = "a") -> dict[str, Any]:
    return {"generation": 1, "attempt": number, "node_id": node_id, "error": {"reason": reason}}


@pytest.fixture
def history() -> History:
    receipts = {"jobs": [{"job_id": JOB}, {"job_id": OTHER}]}
    return History(
        seed=1,
        calls=[
            call("submit", "", receipts, request_id="r"),
            call("submit", "", receipts, request_id="r"),
            call("submit", "", None, request_id="s", outcome=Outcome.UNKNOWN),
            call("get", JOB, job(JOB, "running", version=2)),
            call("get", JOB, job(JOB)),
            call("cancel", OTHER, job(OTHER, "cancelled")),
        ],
        runs=[Run(JOB, "run-1", "a", 1.0, 2.0), Run(OTHER, "run-2", "b", 1.0, 1.0)],
        jobs={JOB: job(JOB), OTHER: job(OTHER, "cancelled")},
        events=[update(JOB, 1), update(OTHER, 1), end(JOB), end(OTHER, "cancelled")],
        outputs={"job-1.png": "job-1 run-1\n"},
        gallery=[{"job_id": JOB}],
        assigned=[(JOB, 1, 1, "a"), (OTHER, 1, 1, "a"), (OTHER, 1, 1, "c"), (OTHER, 1, 2, "b")],
    )


def test_kept_promises_are_no_violations(history: History) -> None:
    assert violations(history) == []


def test_what_was_given_back_counts_once(history: History) -> None:
    _failed(history, (1, "c"), (2, "b"))
    assert violations(history) == []


def _failed_often(history: History) -> None:
    history.jobs[JOB]["attempts"] = [attempt(number, "ENGINE_FAILED") for number in (1, 2)]


def _lost_often(history: History) -> None:
    history.jobs[JOB]["attempts"] = [attempt(number, "NODE_LOST", node) for number, node in enumerate("abaa", 1)]


def _failed(history: History, *attempts: tuple[int, str]) -> None:
    history.jobs[OTHER]["attempts"] = [attempt(number, "NODE_LOST", node) for number, node in attempts]


def _exclusive(history: History) -> None:
    history.jobs[JOB]["exclusive"] = True
    history.runs.append(Run(JOB, "run-3", "a", 1.5, 3.0))


def _went_on(history: History) -> None:
    history.jobs[JOB]["generation"] = 2
    history.events.append(end(JOB, generation=2, version=4))


def _called(history: History, *ids: str, status: str = "succeeded") -> None:
    history.jobs[JOB]["callback_url"] = "http://localhost:1/"
    history.hooks = [{"job_id": JOB, "generation": 1, "webhook_id": one, "status": status} for one in ids]


BREAKS: dict[str, tuple[str, Callable[[History], Any]]] = {
    "an accepted job is gone": ("I1 kept", lambda h: h.jobs.pop(OTHER)),
    "an accepted job never ends": ("I1 kept", lambda h: h.jobs[OTHER].update(status="queued")),
    "a submit said twice is two": (
        "I1 once",
        lambda h: h.calls.append(call("submit", "", {"jobs": [{"job_id": JOB}]}, request_id="r")),
    ),
    "it ends twice": ("I2 one end", lambda h: h.events.append(end(JOB, "failed", version=4))),
    "it ends unheard": ("I2 one end", lambda h: h.events.pop(2)),
    "it ends otherwise than it was told": ("I2 one end", lambda h: h.jobs[JOB].update(status="failed")),
    "it goes on after success": ("I2 one end", _went_on),
    "an end is taken back": ("I2 stays", lambda h: h.calls.append(call("get", JOB, job(JOB, "running")))),
    "a version comes twice": ("I2 stays", lambda h: h.events.insert(1, update(JOB, 1))),
    "a success has no output": ("I3 one run", lambda h: h.jobs[JOB]["result"]["outputs"].clear()),
    "the gallery shows a stale run": ("I3 one run", lambda h: h.gallery.append({"job_id": JOB})),
    "an output is another job's": ("I3 one run", lambda h: h.outputs.update({"job-1.png": "job-2 run-2\n"})),
    "an output is of no run": ("I3 one run", lambda h: h.outputs.update({"job-1.png": "job-1 run-9\n"})),
    "an output is of a stale run": ("I3 one run", lambda h: h.jobs[JOB].update(node_id="c")),
    "an exclusive job overlaps": ("I4 exclusive", _exclusive),
    "it fails more often than it may": ("I5 bounded", _failed_often),
    "poison goes on": ("I5 bounded", _lost_often),
    "a failure is of an attempt that another node had": ("I3 attempts", lambda h: _failed(h, (1, "c"), (2, "a"))),
    "an attempt fails twice": ("I3 attempts", lambda h: _failed(h, (1, "a"), (1, "a"))),
    "a late result is taken": ("I3 late", lambda h: h.taken.append("job-1 took a late success elsewhere")),
    "a cancelled job succeeds": ("I6 cancelled", lambda h: h.jobs.update({OTHER: job(OTHER)})),
    "a cancel does not cancel": ("I6 cancelled", lambda h: h.calls.append(call("cancel", JOB, job(JOB)))),
    "nobody is called": ("I7 called back", _called),
    "one end, two ids": ("I7 called back", lambda h: _called(h, "x", "y")),
    "a callback tells another end": (
        "I7 called back",
        lambda h: _called(h, "x", status="failed"),
    ),
    "a callback is not signed": ("I7 called back", lambda h: h.forged.append("no matching signature")),
    "an answer is another's": ("I13 cross-talk", lambda h: h.calls.append(call("get", JOB, job(OTHER, "cancelled")))),
    "an engine is left": ("left over", lambda h: h.orphans.append("fleet_agent.slot")),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_promise_is_seen(name: str, history: History) -> None:
    invariant, breaks = BREAKS[name]
    broken = copy.deepcopy(history)
    breaks(broken)
    assert any(line.startswith(invariant) for line in violations(broken)), violations(broken)
