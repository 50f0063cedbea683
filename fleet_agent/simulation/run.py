"""What `fleet simulate` does: a fleet of modelled GPUs is run, shown and summed up."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import random
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TextIO

import grpc
import orjson
import typer
from rich.console import Console, RenderableType
from rich.live import Live

from fleet_agent.logs import configure
from fleet_agent.simulation import screen
from fleet_agent.simulation.faults import FaultsError, parse_faults
from fleet_agent.simulation.load import Load
from fleet_agent.simulation.profiles import PROFILES
from fleet_agent.simulation.simulation import Plan, Simulation
from fleet_agent.simulation.slot import Pace
from fleet_agent.simulation.summary import summary
from fleet_agent.simulation.tally import Record

_REACH_SECONDS = 10.0
_FRAME_SECONDS = 0.5
_LINE_SECONDS = 5.0
_WIDE = 10_000
_USUAL_LOAD, _USUAL_MOST = 0.5, 50.0
_UNREACHABLE, _WRONG, _USAGE = 3, 1, 2


@dataclass(frozen=True, slots=True)
class Options:
    """The options of the command, as its help describes them."""

    nodes: int
    profile: str
    server: str
    duration: float
    rate: float | None
    jobs: int
    speed: float
    faults: str
    seed: int
    arrival: float
    outputs: bool
    record: Path | None
    as_json: bool


def run(options: Options) -> None:
    """Runs it to its end. Raises typer.Exit with the command's exit codes."""
    if options.profile not in PROFILES:
        _fail(f"--profile: there is no {options.profile!r}; there are {', '.join(PROFILES)}", _USAGE)
    try:
        chosen = parse_faults(options.faults)
    except FaultsError as error:
        _fail(f"--{error}", _USAGE)
    plan = Plan(
        PROFILES[options.profile],
        options.nodes,
        options.server,
        options.seed,
        Pace(options.speed, options.outputs),
        chosen,
        options.arrival,
        api_key=os.environ.get("FLEET_API_KEY"),
    )
    with _recorder(options.record) as write:
        simulation = Simulation(plan, write)
        rate = options.rate
        if rate is None:
            rate = min(_USUAL_LOAD * simulation.capacity, _USUAL_MOST)
        if rate == 0 and options.jobs:
            _fail("--jobs: needs a --rate above 0", _USAGE)
        try:
            seconds = 0 if options.jobs else options.duration
            # All that was given is good: the process is the simulation's now.
            configure("error")
            random.seed(options.seed)
            asyncio.run(_run(simulation, Load(rate, options.jobs), seconds, options.as_json))
        except _UnreachableError as error:
            _fail(f"{error}: is the server running? Start it with `fleet up`, or name it with --server.", _UNREACHABLE)


class _UnreachableError(Exception):
    """There is no server at that address."""


async def _run(simulation: Simulation, load: Load, seconds: float, as_json: bool) -> None:
    await _reach(simulation.plan.server)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, simulation.stop)
    values: dict[str, Any] = {}

    async def until(running: Simulation) -> None:
        showing = asyncio.create_task(_show(running, seconds))
        try:
            await _until(running, load, seconds, showing)
        finally:
            showing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await showing
            # Before the goodbyes: who is online, and for how long it ran.
            values.update(summary(running))

    await simulation.run(load, until)
    if as_json:
        sys.stdout.write(orjson.dumps(values, option=orjson.OPT_INDENT_2).decode() + "\n")
    else:
        _print(screen.final(simulation, values))
    if simulation.source is not None and simulation.source.last_refusal:
        _say(f"the server refused jobs, the last with {simulation.source.last_refusal}")
    if screen.faults_of_the_server(values):
        raise typer.Exit(_WRONG)


def _print(page: RenderableType) -> None:
    """On a terminal as wide as that is; elsewhere each row is one line."""
    out = Console(highlight=False)
    if out.is_terminal:
        out.print(page)
        return
    text = io.StringIO()
    Console(file=text, width=_WIDE, color_system=None).print(page)
    sys.stdout.write("".join(f"{line.rstrip()}\n" for line in text.getvalue().splitlines()))


async def _until(simulation: Simulation, load: Load, seconds: float, showing: asyncio.Task[None]) -> None:
    """Returns at the end: of the time, or of the jobs. A page that breaks ends it too."""
    ending = asyncio.create_task(_end(simulation, load, seconds))
    try:
        await asyncio.wait({ending, showing}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        ending.cancel()
    if showing.done():
        showing.result()


async def _end(simulation: Simulation, load: Load, seconds: float) -> None:
    await simulation.all_online()
    if not load.jobs:
        await asyncio.sleep(seconds or float("inf"))
        return
    await simulation.drained.wait()


async def _show(simulation: Simulation, seconds: float) -> None:
    """Draws until cancelled: a page where standard error is a terminal, else a line now and then."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        while True:
            await asyncio.sleep(_LINE_SECONDS)
            _say(screen.line(simulation, await _stats(simulation)))
    with Live(console=console, auto_refresh=False, transient=True, vertical_overflow="crop") as live:
        while True:
            live.update(screen.page(simulation, await _stats(simulation), seconds or None), refresh=True)
            await asyncio.sleep(_FRAME_SECONDS)


async def _stats(simulation: Simulation) -> Any:
    return None if simulation.source is None else await simulation.source.stats()


async def _reach(server: str) -> None:
    async with grpc.aio.insecure_channel(server) as channel:
        try:
            async with asyncio.timeout(_REACH_SECONDS):
                await channel.channel_ready()
        except TimeoutError:
            raise _UnreachableError(f"{server} does not answer") from None


@contextlib.contextmanager
def _recorder(path: Path | None) -> Iterator[Record | None]:
    if path is None:
        yield None
        return
    try:
        file: TextIO = path.open("w")
    except OSError as error:
        _fail(f"--record: {path}: {error.strerror}", _USAGE)
    with file:
        yield lambda fields: _write(file, fields)


def _write(file: TextIO, fields: dict[str, Any]) -> None:
    file.write(orjson.dumps(fields).decode() + "\n")


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _fail(text: str, code: int) -> NoReturn:
    _say(f"error: {text}")
    raise typer.Exit(code)
