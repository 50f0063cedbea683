"""`fleet simulate`."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn, TextIO

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


def simulate(
    nodes: Annotated[int, typer.Option("--nodes", "-n", min=1, max=20_000, help="How many agents.")] = 20,
    profile: Annotated[str, typer.Option("--profile", "-p", help=f"What fleet: {', '.join(PROFILES)}.")] = "mixed",
    server: Annotated[str, typer.Option(help="Address of the server's gRPC port.")] = "localhost:50051",
    duration: Annotated[float, typer.Option(min=0, help="Seconds, once all nodes are online; 0: until Ctrl-C.")] = 60,
    rate: Annotated[
        float | None, typer.Option(min=0, help="Jobs a second; 0: none, only agents.", show_default="half of capacity")
    ] = None,
    jobs: Annotated[int, typer.Option(min=0, help="Send so many jobs and end with the last of them.")] = 0,
    speed: Annotated[float, typer.Option(min=0.01, max=1000, help="How many times as fast the GPUs work.")] = 1.0,
    faults: Annotated[
        str,
        typer.Option(help="What goes wrong: none, some, or rates as below."),
    ] = "none",
    seed: Annotated[int, typer.Option(help="The same seed gives the same fleet, jobs and faults.")] = 7,
    arrival: Annotated[float, typer.Option(min=0, help="The agents dial within so many seconds.")] = 10,
    outputs: Annotated[bool, typer.Option("--outputs/--no-outputs", help="Upload a tiny picture for each.")] = True,
    record: Annotated[Path | None, typer.Option(help="Write what the agents saw to this file, a JSON a line.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Run a fleet of modelled GPUs against a real server, over the agents' real protocol, and show how it copes.

    Nothing is computed: loading and running take the time that such a GPU would need. The nodes are called sim-… and
    have the label simulated=true; send your own jobs too, if you like. The key, where there is one, is FLEET_API_KEY.

    Profiles: mixed is a large fleet of all sorts with pictures, text and custom jobs; homelab is five unequal GPUs
    (4090, 3090, 3060, 1080 Ti, Orin), again and again; jetsons is Orins of three sizes with small models.

    Faults: crash and disconnect are rates per node and hour; slow and failing are shares of the nodes, engine and oom
    of the attempts. For instance: --faults disconnect=30,oom=0.02

    Exit codes: 0 done, 1 the server did what it must never do (a job succeeded twice, a healthy attempt was killed),
    2 bad arguments, 3 no server.
    """
    if profile not in PROFILES:
        _fail(f"--profile: there is no {profile!r}; there are {', '.join(PROFILES)}", _USAGE)
    try:
        chosen = parse_faults(faults)
    except FaultsError as error:
        _fail(f"--{error}", _USAGE)
    configure("error")
    random.seed(seed)
    plan = Plan(
        PROFILES[profile],
        nodes,
        server,
        seed,
        Pace(speed, outputs),
        chosen,
        arrival,
        api_key=os.environ.get("FLEET_API_KEY"),
    )
    with _recorder(record) as write:
        simulation = Simulation(plan, write)
        if rate is None:
            rate = min(_USUAL_LOAD * simulation.capacity, _USUAL_MOST)
        if rate == 0 and jobs:
            _fail("--jobs: needs a --rate above 0", _USAGE)
        try:
            asyncio.run(_run(simulation, Load(rate, jobs), 0 if jobs else duration, as_json))
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
