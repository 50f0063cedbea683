"""The invariants over one history, offline. Pure: a history in, violations out, each with the invariant's number.

I1 accepted means kept and ended. I2 one end for each (job, generation), and it stays. I3 the result is that of one run,
nothing of a stale run shows. I4 two runs of an exclusive job never overlap. I5 attempts and losses are bounded. I6 what
was acknowledged as cancelled ends cancelled. I7 each end calls back, under one id. I13 nobody gets another's answer.
Keyed is one submit, however often it is said (I1).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

from tests.chaos.history import History, Outcome

ENDED = frozenset({"succeeded", "failed", "cancelled"})
POISON_LOSSES = 3


def violations(history: History) -> list[str]:
    """Every broken promise, as a line each; empty where all were kept."""
    return [f"{name}: {text}" for name, check in CHECKS.items() for text in check(history)]


def _kept(history: History) -> Iterator[str]:
    for job_id in sorted(history.accepted()):
        job = history.jobs.get(job_id)
        if job is None:
            yield f"{job_id} was accepted and is gone"
        elif job["status"] not in ENDED:
            yield f"{job_id} was accepted and is still {job['status']}"


def _once(history: History) -> Iterator[str]:
    for request_id, answers in history.submitted().items():
        if len(set(answers)) > 1:
            yield f"the submit {request_id} gave {' and '.join(sorted(set(answers)))}"


def _one_end(history: History) -> Iterator[str]:
    ends: dict[tuple[str, int], list[str]] = defaultdict(list)
    for event in history.events:
        if event["type"] == "job_complete":
            job = event["data"]
            ends[job["job_id"], job["generation"]].append(job["status"])
    for (job_id, generation), found in sorted(ends.items()):
        if len(found) > 1:
            yield f"{job_id} generation {generation} ended {len(found)} times: {', '.join(found)}"
    for job_id, job in sorted(history.jobs.items()):
        for generation in range(1, job["generation"] + 1):
            if job["status"] in ENDED and (job_id, generation) not in ends:
                yield f"{job_id} generation {generation} ended without an event"
        last = ends.get((job_id, job["generation"]), [])
        if last and last[0] != job["status"]:
            yield f"{job_id} ended {last[0]} and is {job['status']}"
        for generation in range(1, job["generation"]):
            if any(status != "failed" for status in ends.get((job_id, generation), [])):
                yield f"{job_id} was {ends[job_id, generation][0]} in generation {generation} and went on"


def _stays_ended(history: History) -> Iterator[str]:
    seen: dict[tuple[str, int], str] = {}
    for call in history.calls:
        if call.what != "get" or call.outcome is not Outcome.OK:
            continue
        job = call.reply
        key = job["job_id"], job["generation"]
        if key in seen and seen[key] != job["status"]:
            yield f"{key[0]} generation {key[1]} had ended {seen[key]} and was {job['status']} later"
        if job["status"] in ENDED:
            seen[key] = job["status"]
    ordered: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for event in history.events:
        if event["type"] in ("job_update", "job_complete"):
            job = event["data"]
            ordered[job["job_id"]].append((job["version"], job["status"]))
    for job_id, changes in ordered.items():
        for (before, _), (after, _) in pairwise(changes):
            if after <= before:
                yield f"{job_id} has version {after} after {before}"


def _one_run(history: History) -> Iterator[str]:
    runs = {run.run_id: run for run in history.runs}
    shown: Counter[str] = Counter(row["job_id"] for row in history.gallery)
    for job_id, job in sorted(history.jobs.items()):
        outputs = (job["result"] or {}).get("outputs", [])
        wanted = 1 if job["status"] == "succeeded" else 0
        if len(outputs) != wanted:
            yield f"{job_id} is {job['status']} with {len(outputs)} outputs"
        if shown[job_id] != wanted:
            yield f"{job_id} is {job['status']} and the gallery shows {shown[job_id]} of it"
        for output in outputs:
            words = history.outputs.get(output["filename"], "").split()
            run = runs.get(words[1]) if len(words) == 2 and words[0] == job_id else None
            if run is None or run.job_id != job_id:
                yield f"{job_id} has the output {output['filename']} of {' '.join(words) or 'nobody'}"
            elif run.node_id != job["node_id"]:
                yield f"{job_id} ran on {job['node_id']} at last and has the output of its run on {run.node_id}"


def _no_overlap(history: History) -> Iterator[str]:
    last: dict[str, Any] = {}
    for run in history.runs:
        job = history.jobs.get(run.job_id)
        if job is None or not job["exclusive"]:
            continue
        before = last.get(run.job_id)
        if before is not None and before.ended > run.began:
            yield f"{run.job_id} is exclusive and ran twice at once"
        last[run.job_id] = run


def _bounded(history: History) -> Iterator[str]:
    for job_id, job in sorted(history.jobs.items()):
        failures: Counter[int] = Counter()
        losses: dict[int, list[str]] = defaultdict(list)
        for attempt in job["attempts"]:
            if attempt["error"]["reason"] == "NODE_LOST":
                losses[attempt["generation"]].append(attempt["node_id"])
            else:
                failures[attempt["generation"]] += 1
        for generation, count in failures.items():
            if count > job["max_retries"] + 1:
                yield f"{job_id} generation {generation} failed {count} times with max_retries {job['max_retries']}"
        for generation, nodes in losses.items():
            before_last = nodes[:-1]
            if len(before_last) >= POISON_LOSSES and len(set(before_last)) > 1:
                yield f"{job_id} generation {generation} went on after it was lost on {', '.join(before_last)}"


def _theirs(history: History) -> Iterator[str]:
    given: dict[tuple[str, int, int], set[str]] = defaultdict(set)
    for job_id, generation, number, node_id in history.assigned:
        given[job_id, generation, number].add(node_id)
    for job_id, job in sorted(history.jobs.items()):
        known: set[tuple[int, int]] = set()
        for attempt in job["attempts"]:
            key = attempt["generation"], attempt["attempt"]
            if key in known:
                yield f"{job_id} generation {key[0]} has attempt {key[1]} twice"
            known.add(key)
            if attempt["node_id"] not in given[job_id, *key]:
                yield f"{job_id} generation {key[0]} has attempt {key[1]} of {attempt['node_id']}, which had another"


def _late(history: History) -> Iterator[str]:
    yield from history.taken


def _cancelled(history: History) -> Iterator[str]:
    for call in history.calls:
        if call.what == "cancel" and call.outcome is Outcome.OK:
            job = history.jobs.get(call.job_id)
            if call.reply["status"] != "cancelled":
                yield f"the cancel of {call.job_id} was answered with {call.reply['status']}"
            elif job is not None and (job["status"], job["generation"]) != ("cancelled", call.reply["generation"]):
                yield f"{call.job_id} was cancelled and is {job['status']}"


def _called_back(history: History) -> Iterator[str]:
    ids: dict[tuple[str, int], set[str]] = defaultdict(set)
    for hook in history.hooks:
        ids[hook["job_id"], hook["generation"]].add(hook["webhook_id"])
    for key, found in sorted(ids.items()):
        if len(found) > 1:
            yield f"{key[0]} generation {key[1]} called back under {len(found)} ids"
    for error in history.forged:
        yield f"a callback does not verify: {error}"
    for hook in history.hooks:
        job = history.jobs.get(hook["job_id"])
        if job is not None and job["generation"] == hook["generation"] and job["status"] != hook["status"]:
            yield f"{hook['job_id']} called back as {hook['status']} and is {job['status']}"
    for job_id, job in sorted(history.jobs.items()):
        if job["callback_url"]:
            for generation in range(1, job["generation"] + 1):
                if (job_id, generation) not in ids:
                    yield f"{job_id} generation {generation} ended and nobody was called"


def _no_cross_talk(history: History) -> Iterator[str]:
    for call in history.calls:
        if call.outcome is Outcome.OK and call.job_id and call.reply["job_id"] != call.job_id:
            yield f"a {call.what} of {call.job_id} was answered with {call.reply['job_id']}"


def _nothing_left(history: History) -> Iterator[str]:
    for line in history.orphans:
        yield f"an engine without its agent: {line}"


CHECKS: dict[str, Callable[[History], Iterator[str]]] = {
    "I1 kept": _kept,
    "I1 once": _once,
    "I2 one end": _one_end,
    "I2 stays": _stays_ended,
    "I3 one run": _one_run,
    "I3 attempts": _theirs,
    "I3 late": _late,
    "I4 exclusive": _no_overlap,
    "I5 bounded": _bounded,
    "I6 cancelled": _cancelled,
    "I7 called back": _called_back,
    "I13 cross-talk": _no_cross_talk,
    "left over": _nothing_left,
}
