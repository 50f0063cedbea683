"""A thousand agents on one server: what their heartbeats cost, how soon a job reaches one, and how they come back after
the server was killed.

    python -m bench.agents [--agents 1000] [--rate 20] [--seconds 30]

One `fleet up` (server and store, fsync always) in a process of its own; the agents are simulated (`fleet simulate`), in
this process: real sessions over real gRPC streams, 50 to a connection, 5 s heartbeats, modelled GPUs. CPU is user and
system time of the server's process, by the kernel's account. `dispatch` is from the call of the submit to the Assign in
the agent's hands, for jobs that any free node can begin at once (`custom`, without a model to load or to wait for).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench._machine import core_waits, heading
from bench._server import ServerProcess
from fleet_agent.logs import configure
from fleet_agent.simulation.load import Load
from fleet_agent.simulation.profiles import CUSTOM, PROFILES, JobKind, Profile
from fleet_agent.simulation.simulation import Plan, Simulation
from fleet_agent.simulation.slot import Pace
from fleet_agent.simulation.summary import peak_rate, percentile

CPU_SHARE, DISPATCH_MS, BACK_SECONDS, PEAK = 0.25, 50.0, 45.0, 3.0
JOB_SECONDS = 4.0
_SETTLE_SECONDS = 6.0
_BIN_SECONDS = 1.0


@dataclass(slots=True)
class Figures:
    """What was measured; rates a second, times in seconds."""

    arrival: float = 0.0
    hello_ms: float = 0.0
    beats: float = 0.0
    idle_share: float = 0.0
    idle_store: float = 0.0
    busy_share: float = 0.0
    busy_store: float = 0.0
    held: float = 0.0
    waits: tuple[float, float] = (0.0, 0.0)
    """Of the time that jobs were measured: server and agents waited for a core."""
    dispatch: list[float] = field(default_factory=list)
    restart: float = 0.0
    back: float = 0.0
    dials: int = 0
    mean: float = 0.0
    peak: float = 0.0
    unfinished: int = 0


def main() -> None:
    """Runs it and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--agents", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=20, help="jobs a second")
    parser.add_argument("--seconds", type=float, default=30, help="length of each measurement")
    options = parser.parse_args()
    configure("error")
    random.seed(7)
    sys.stdout.write(heading() + f"{options.agents:,} agents, {options.rate:g} jobs a second of {JOB_SECONDS:g} s\n\n")
    with tempfile.TemporaryDirectory(prefix="fleet-bench-") as folder, ServerProcess(Path(folder)) as server:
        figures, simulation = asyncio.run(measure(server, options.agents, options.rate, options.seconds))
    sys.stdout.write(table(figures, simulation))
    sys.stdout.write(f"\nload average after: {', '.join(f'{value:.1f}' for value in os.getloadavg())}\n")


async def measure(server: ServerProcess, agents: int, rate: float, seconds: float) -> tuple[Figures, Simulation]:
    """Arrival, heartbeats alone, jobs, and a kill."""
    profile: Profile = replace(PROFILES["mixed"], jobs=(JobKind(1, CUSTOM, seconds=JOB_SECONDS),))
    address = f"127.0.0.1:{server.grpc_port}"
    simulation = Simulation(Plan(profile, agents, address, pace=Pace(outputs=False)))
    figures = Figures()

    async def until(running: Simulation) -> None:
        begun, cpu = time.monotonic(), server.cpu_seconds()[0]
        await running.all_online()
        figures.arrival = time.monotonic() - begun
        figures.hello_ms = 1000 * (server.cpu_seconds()[0] - cpu) / agents
        await asyncio.sleep(_SETTLE_SECONDS)
        beats = running.tally.beats
        figures.idle_share, figures.idle_store = await _shares(server, seconds)
        figures.beats = (running.tally.beats - beats) / seconds
        running.let_jobs_in()
        await asyncio.sleep(JOB_SECONDS)
        running.tally.dispatch.clear()
        waits = core_waits(server.pid), core_waits()
        figures.busy_share, figures.busy_store = await _shares(server, seconds)
        figures.waits = (core_waits(server.pid) - waits[0]) / seconds, (core_waits() - waits[1]) / seconds
        figures.held, figures.dispatch = running.tally.running, list(running.tally.dispatch)
        await _kill(server, running, figures)

    await simulation.run(Load(rate), until, jobs_wait=True)
    return figures, simulation


async def _shares(server: ServerProcess, seconds: float) -> tuple[float, float]:
    """CPU of server and store over that time, as shares of a core."""
    begun, before = time.monotonic(), server.cpu_seconds()
    await asyncio.sleep(seconds)
    after, took = server.cpu_seconds(), time.monotonic() - begun
    return (after[0] - before[0]) / took, (after[1] - before[1]) / took


async def _kill(server: ServerProcess, simulation: Simulation, figures: Figures) -> None:
    """Kills the server under work, starts it again, and waits until all agents are back and the jobs have ended."""
    tally = simulation.tally
    killed_at = time.monotonic()
    server.kill()
    await tally.someone_offline.wait()
    figures.restart = await asyncio.to_thread(server.start)
    up_at = time.monotonic()
    await simulation.all_online()
    back_at = time.monotonic()
    figures.back = back_at - killed_at
    dials = [at for at in tally.dials if up_at <= at <= back_at]
    figures.dials = len(dials)
    figures.mean = len(dials) / max(back_at - up_at, _BIN_SECONDS)
    figures.peak = peak_rate(dials, _BIN_SECONDS)
    simulation.stop_jobs()
    try:
        async with asyncio.timeout(60):
            await simulation.drained.wait()
    except TimeoutError:
        figures.unfinished = tally.unfinished


def table(figures: Figures, simulation: Simulation) -> str:
    """The results, with their targets."""
    tally = simulation.tally
    dispatch = [1000 * (percentile(figures.dispatch, share) or 0) for share in (0.5, 0.95, 0.99)]
    wrong = tally.healthy_kills + tally.overlaps + tally.done_twice
    ratio = figures.peak / figures.mean if figures.mean else 0.0
    rows = [
        ("all agents connected after", f"{figures.arrival:.1f} s, {figures.hello_ms:.1f} ms of CPU each", "", None),
        (
            "CPU for heartbeats alone",
            f"{100 * figures.idle_share:.1f} % of a core (store {100 * figures.idle_store:.1f} %), "
            f"{figures.beats:.0f} a second",
            f"< {100 * CPU_SHARE:.0f} %",
            figures.idle_share < CPU_SHARE,
        ),
        (
            "CPU with jobs",
            f"{100 * figures.busy_share:.1f} % (store {100 * figures.busy_store:.1f} %), {figures.held:.0f} running",
            "",
            None,
        ),
        (
            "meanwhile ready to run, but without a core",
            f"server {100 * figures.waits[0]:.1f} %, agents {100 * figures.waits[1]:.1f} % of the time",
            "",
            None,
        ),
        (
            f"dispatch of {len(figures.dispatch):,} jobs",
            "p50 {:.1f}, p95 {:.1f}, p99 {:.1f} ms".format(*dispatch),
            f"p99 <= {DISPATCH_MS:g} ms",
            dispatch[2] <= DISPATCH_MS,
        ),
        (
            "all back after the kill",
            f"{figures.back:.1f} s, of which {figures.restart:.1f} s until the server was ready",
            f"<= {BACK_SECONDS:g} s",
            figures.back <= BACK_SECONDS,
        ),
        (
            "peak of connects, by the second",
            f"{figures.peak:.0f}/s, mean {figures.mean:.1f}/s, ratio {ratio:.2f} ({figures.dials:,} connects)",
            f"< {PEAK:g} x mean",
            ratio < PEAK,
        ),
        (
            "healthy attempts killed, run twice, or succeeded twice",
            f"{tally.healthy_kills}, {tally.overlaps}, {tally.done_twice} of {tally.assigns:,}; "
            f"{figures.unfinished} jobs unfinished",
            "0",
            wrong == 0 and figures.unfinished == 0,
        ),
    ]
    lines = ["| | | target | |\n|---|---|---|---|\n"]
    for name, value, target, met in rows:
        verdict = "" if met is None else "met" if met else "missed"
        lines.append(f"| {name} | {value} | {target} | {verdict} |\n")
    return "".join(lines)


if __name__ == "__main__":
    main()
