"""REST requests a second: our bridge with its whole chain on, against FastAPI + pydantic and Envoy -> grpc.aio.

    python -m bench.bridge [--rounds 5] [--seconds 2]

All serve the service of `bench/peers/jobs.proto`: GET of one job (17 fields) and POST of one, which is echoed. Their
answers are compared before anything is timed. wrk loads them from a process of its own, with 64 connections and with
4; the contenders take turns within each round, each round begins with another one, and ratios are formed within rounds,
so that noise of the machine meets all alike. CPU is the processor time of a contender's own processes for each request.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import _wrk
from bench._machine import heading
from bench.peers.sample import API_KEY, CREATE, JOB, JOB_ID
from bench.peers.start import Contender, contenders

HEADERS = {"X-API-Key": API_KEY}
OURS, FASTAPI, ENVOY = "ours", "FastAPI + pydantic", "Envoy -> grpc.aio"
BODY = json.dumps(CREATE)


@dataclass(frozen=True, slots=True)
class Case:
    """One way to load a server."""

    method: str
    connections: int

    def __str__(self) -> str:
        return f"{self.method}, {self.connections} connections"


@dataclass(frozen=True, slots=True)
class Run:
    """What one contender did in one round of one case."""

    load: _wrk.Load
    cpu_us: float


@dataclass(frozen=True, slots=True)
class Target:
    """A bound of a ratio ours/peer: at least `bound`, or at most it where less is better."""

    case: Case
    peer: str
    what: str
    bound: float

    @property
    def at_most(self) -> bool:
        return self.what == "p99"

    def ratio(self, ours: Run, peer: Run) -> float:
        if self.what == "p99":
            return ours.load.p99 / peer.load.p99
        return ours.load.per_second / peer.load.per_second


CASES = tuple(Case(method, connections) for method in ("GET", "POST") for connections in (64, 4))
TARGETS = (
    Target(Case("GET", 64), FASTAPI, "requests/s", 1.5),
    Target(Case("POST", 64), FASTAPI, "requests/s", 1.4),
    Target(Case("GET", 64), ENVOY, "requests/s", 2.0),
    Target(Case("POST", 64), ENVOY, "requests/s", 1.7),
    Target(Case("GET", 4), FASTAPI, "p99", 1.25),
    Target(Case("POST", 4), FASTAPI, "p99", 1.25),
)
Results = dict[Case, dict[str, list[Run]]]


def main() -> None:
    """Runs all rounds and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=2, help="of load, for each contender, case and round")
    options = parser.parse_args()
    _wrk.require_wrk()
    sys.stdout.write(heading())
    with tempfile.TemporaryDirectory() as name, contenders(Path(name)) as running:
        compare(running)
        script = _wrk.write_post(Path(name), BODY)
        results = measure(running, script, options.rounds, options.seconds)
    sys.stdout.write(report(results))


def compare(running: Iterable[Contender]) -> None:
    """Holds each answer against the sample. SystemExit where one differs by more than the listed spellings."""
    for contender in running:
        for method in ("GET", "POST"):
            answer = _ask(contender, method)
            plain, differences = _plain(answer)
            if plain != _plain(JOB)[0]:
                wrong = {name: plain.get(name) for name, value in _plain(JOB)[0].items() if plain.get(name) != value}
                raise SystemExit(f"{contender.name}: the answer to {method} differs: {wrong or sorted(plain)}")
            sys.stdout.write(f"{contender.name}: {method} equal, {', '.join(differences) or 'in the same spelling'}\n")


def _ask(contender: Contender, method: str) -> dict[str, Any]:
    path = "/v1/jobs" if method == "POST" else f"/v1/jobs/{JOB_ID}"
    body = BODY.encode() if method == "POST" else None
    headers = HEADERS | ({"Content-Type": "application/json"} if body else {})
    request = urllib.request.Request(contender.url + path, data=body, headers=headers, method=method)
    with urllib.request.urlopen(request, timeout=10) as reply:
        answer: dict[str, Any] = json.load(reply)
        return answer


def _plain(answer: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The answer without what the peers spell differently by design, and what was different in it."""
    plain, differences = json.loads(json.dumps(answer)), []

    def respell(within: dict[str, Any], name: str, respelt: Callable[[Any], Any], what: str) -> None:
        value = within.get(name)
        if value is not None and (new := respelt(value)) != value:
            within[name] = new
            if what and what not in differences:
                differences.append(what)

    respell(plain, "state", str.lower, "enum in capitals")
    respell(plain, "version", int, "64-bit integers as strings")
    respell(plain["resources"], "memory_bytes", int, "64-bit integers as strings")
    for name in ("create_time", "update_time"):
        if plain.get(name) != JOB[name]:
            respell(plain, name, _in_microseconds, "six digits in each time")
        plain[name] = _in_microseconds(plain[name])
    return plain, differences


def _in_microseconds(text: str) -> str:
    return datetime.datetime.fromisoformat(text).isoformat(timespec="microseconds")


def measure(running: Sequence[Contender], script: Path, rounds: int, seconds: int) -> Results:
    """All runs, after a second of warming up for each contender and method."""
    for contender in running:
        for method in ("GET", "POST"):
            _load(contender, Case(method, 64), script, 1)
    results: Results = {case: {contender.name: [] for contender in running} for case in CASES}
    for number in range(rounds):
        for case in CASES:
            first = number % len(running)
            for contender in (*running[first:], *running[:first]):
                before = contender.cpu_seconds()
                load = _load(contender, case, script, seconds)
                cpu_us = (contender.cpu_seconds() - before) / load.requests * 1e6
                results[case][contender.name].append(Run(load, cpu_us))
        sys.stdout.write(f"round {number + 1} of {rounds} done\n")
        sys.stdout.flush()
    return results


def _load(contender: Contender, case: Case, script: Path, seconds: int) -> _wrk.Load:
    post = case.method == "POST"
    url = contender.url + ("/v1/jobs" if post else f"/v1/jobs/{JOB_ID}")
    return _wrk.run(
        url, connections=case.connections, seconds=seconds, headers=HEADERS, script=script if post else None
    )


def report(results: Results) -> str:
    """Tables in Markdown: medians with ranges, then the ratios and whether they meet their targets."""
    lines = ["", "| | requests/s | p50 ms | p99 ms | CPU us/request |", "|---|---|---|---|---|"]
    for case, peers in results.items():
        for name, runs in peers.items():
            cells = (
                _spread([run.load.per_second for run in runs], ".0f"),
                _spread([run.load.p50 for run in runs], ".2f"),
                _spread([run.load.p99 for run in runs], ".2f"),
                _spread([run.cpu_us for run in runs], ".0f"),
            )
            lines.append(f"| {case}: {name} | {' | '.join(cells)} |")
    lines += ["", "| ours / peer, by round | median [range] | target | |", "|---|---|---|---|"]
    for target in TARGETS:
        pairs = zip(results[target.case][OURS], results[target.case][target.peer], strict=True)
        ratios = [target.ratio(ours, peer) for ours, peer in pairs]
        median = statistics.median(ratios)
        met = median <= target.bound if target.at_most else median >= target.bound
        bound = f"{'<=' if target.at_most else '>='} {target.bound:g}"
        name = f"{target.case}: {target.what} / {target.peer}"
        lines.append(f"| {name} | {_spread(ratios, '.2f')} | {bound} | {'met' if met else 'missed'} |")
    lines += ["", "| CPU of peer / ours, by round (no target; the least noisy figure) | median [range] |", "|---|---|"]
    for case, peers in results.items():
        for peer in (FASTAPI, ENVOY):
            quotients = [theirs.cpu_us / ours.cpu_us for ours, theirs in zip(peers[OURS], peers[peer], strict=True)]
            lines.append(f"| {case}: {peer} | {_spread(quotients, '.2f')} |")
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float], form: str) -> str:
    return f"{statistics.median(values):{form}} [{min(values):{form}} - {max(values):{form}}]"


if __name__ == "__main__":
    main()
