"""How a simulation looks: a live page on a terminal, a line every few seconds elsewhere, tables at the end."""

from __future__ import annotations

import time
from typing import Any

from fleet.v1 import queue_pb2, types_pb2
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fleet_agent.simulation.simulation import Simulation
from fleet_agent.simulation.summary import spread, summary, throughput

LANES_SHOWN = 8
_BAR = 20
_RECENT = 2_000
"""The latest dispatches that the live figures are of."""


def page(simulation: Simulation, stats: queue_pb2.GetStatsResponse | None, limit: float | None) -> Group:
    """The live page. `stats` are the server's own figures, None while it does not answer."""
    values = summary(simulation)
    parts: list[RenderableType] = [_title(simulation, limit), _fields(live_fields(simulation, values, stats))]
    if stats is not None and stats.lanes:
        parts += [Text(), lanes_table(stats)]
    return Group(*parts, Text(), classes_table(values))


def live_fields(
    simulation: Simulation, values: dict[str, Any], stats: queue_pb2.GetStatsResponse | None
) -> list[tuple[str, str]]:
    """Names and values of the live page."""
    tally, nodes, jobs, attempts = simulation.tally, values["nodes"], values["jobs"], values["attempts"]
    rate = throughput(tally.ends, time.monotonic())
    refused = f", {jobs['refused']:,} refused" if jobs["refused"] else ""
    fields = [
        ("nodes", f"{nodes['online']:,} of {nodes['planned']:,} online" + _crashes(nodes)),
        ("jobs", f"{jobs['submitted']:,} sent{refused}, {jobs['succeeded']:,} done, {jobs['failed']:,} failed"),
        ("rate", f"{rate:.1f} a second; without swaps the GPUs could do {simulation.capacity:,.1f}"),
    ]
    if stats is None:
        fields.append(("queue", f"{tally.running:,} on nodes; the server does not answer"))
    else:
        fields.append(("queue", f"{stats.jobs.running:,} running, {stats.jobs.queued:,} waiting"))
    fields += [
        ("dispatch", times(spread(tally.dispatch[-_RECENT:]))),
        ("swaps", f"{values['swaps']:,}"),
    ]
    if attempts["failed"] or attempts["dropped"] or attempts["late_ends_refused"]:
        words = f"{attempts['failed']:,} failed, {attempts['dropped']:,} dropped by the server"
        fields.append(("attempts", f"{words}, {attempts['late_ends_refused']:,} late ends refused"))
    if faults := faults_of_the_server(values):
        fields.append(("WRONG", faults))
    return fields


def line(simulation: Simulation, stats: queue_pb2.GetStatsResponse | None) -> str:
    """One line for a log."""
    values = summary(simulation)
    words = [f"{name} {value}" for name, value in live_fields(simulation, values, stats)]
    return f"{clock(values['seconds'])}  " + "; ".join(words)


def final(simulation: Simulation, values: dict[str, Any]) -> Group:
    """The tables at the end."""
    jobs, attempts = values["jobs"], values["attempts"]
    fields = [
        ("nodes", f"{values['nodes']['planned']:,}" + _crashes(values["nodes"])),
        (
            "jobs",
            f"{jobs['submitted']:,} sent, {jobs['succeeded']:,} done ({jobs['per_second']:.1f} a second), "
            f"{jobs['failed']:,} failed, {jobs['unfinished']:,} unfinished, {jobs['refused']:,} refused",
        ),
        (
            "attempts",
            f"{attempts['assigned']:,} given out, {attempts['failed']:,} failed, {attempts['rejected']:,} rejected, "
            f"{attempts['dropped']:,} dropped, {attempts['late_ends_refused']:,} late ends refused",
        ),
        ("dispatch", times(values["dispatch_seconds"])),
        ("submit to end", times(values["turnaround_seconds"])),
        ("swaps", f"{values['swaps']:,}"),
        ("wrong", faults_of_the_server(values) or "nothing"),
    ]
    parts: list[RenderableType] = [
        _title(simulation, None),
        _fields(fields),
        Text(),
        classes_table(values),
        Text(),
        placements(values),
    ]
    return Group(*parts)


def times(values: dict[str, Any]) -> str:
    """p50, p95, p99 and the greatest."""
    if not values["count"]:
        return "-"
    return ", ".join(f"{name} {duration(values[name])}" for name in ("p50", "p95", "p99", "max"))


def duration(seconds: float) -> str:
    """14 ms, 1.25 s, 12 s."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"


def clock(seconds: float) -> str:
    """2:05, 1:02:05."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def faults_of_the_server(values: dict[str, Any]) -> str:
    """What must never be, in words; "" where it was not."""
    return ", ".join(
        f"{count:,} {name.replace('_', ' ')}" for name, count in values["faults_of_the_server"].items() if count
    )


def lanes_table(stats: queue_pb2.GetStatsResponse) -> Table:
    """The longest lines of the queue."""
    table = _table("waiting in", "jobs", "running", "oldest")
    lanes = sorted(stats.lanes, key=lambda lane: -lane.queued)
    for lane in lanes[:LANES_SHOWN]:
        word = types_pb2.JobType.Name(lane.job_type).removeprefix("JOB_TYPE_").lower()
        name = " + ".join(name for name in (lane.target_model or word, *lane.loras))
        oldest = duration(lane.oldest_queued_seconds) if lane.HasField("oldest_queued_seconds") else "-"
        table.add_row(f"{name} (paused)" if lane.paused else name, f"{lane.queued:,}", f"{lane.running:,}", oldest)
    if len(lanes) > LANES_SHOWN:
        rest = lanes[LANES_SHOWN:]
        table.add_row(f"{len(rest)} more", f"{sum(lane.queued for lane in rest):,}", "", "")
    return table


def classes_table(values: dict[str, Any]) -> Table:
    """What each kind of GPU did."""
    table = _table("GPU", "nodes", "slots", "done", "swaps", "busy", "loading")
    table.add_column("")
    for name, one in values["classes"].items():
        busy, loading = one["utilisation"], one["loading"]
        table.add_row(
            name,
            f"{one['nodes']:,}",
            f"{one['slots']:,}",
            f"{one['succeeded']:,}",
            f"{one['swaps']:,}",
            f"{100 * busy:.0f} %",
            f"{100 * loading:.0f} %",
            bar(busy - loading, loading),
        )
    return table


def placements(values: dict[str, Any]) -> Table:
    """How many attempts of each model were given out."""
    table = _table("model or type", "attempts", "on nodes")
    for name, one in values["placements"].items():
        table.add_row(name, f"{one['attempts']:,}", f"{one['nodes']:,}")
    return table


def bar(working: float, loading: float) -> Text:
    """Work, and loading behind it, of a whole."""
    work = max(0, min(_BAR, round(working * _BAR)))
    load = max(0, min(_BAR - work, round(loading * _BAR)))
    text = Text("█" * work, style="green")
    text.append("▒" * load, style="yellow")
    return text.append("·" * (_BAR - work - load), style="bright_black")


def _crashes(nodes: dict[str, Any]) -> str:
    count = nodes["crashes"]
    return "" if not count else f", {count:,} {'crash' if count == 1 else 'crashes'}"


def _title(simulation: Simulation, limit: float | None) -> Text:
    plan = simulation.plan
    speed = "" if plan.pace.speed == 1 else f", {plan.pace.speed:g} times as fast"
    text = Text(f"{plan.profile.name}", style="bold")
    text.append(f"  {plan.nodes:,} simulated nodes at {plan.server}, seed {plan.seed}{speed}", style="not bold")
    at = clock(time.monotonic() - simulation.started_at)
    return text.append(f"  {at} of {clock(limit)}" if limit else f"  {at}", style="bright_black")


def _fields(fields: list[tuple[str, str]]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bright_black", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in fields:
        table.add_row(Text(name, style="bold red" if name == "WRONG" else ""), value)
    return table


def _table(first: str, *numbers: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column(first, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table
