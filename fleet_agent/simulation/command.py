"""`fleet simulate`: its options. What it does is imported when it is asked for, since every command loads this file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fleet_agent.simulation.profiles import PROFILES


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
    from fleet_agent.simulation.run import Options, run

    run(
        Options(
            nodes, profile, server, duration, rate, jobs, speed, faults, seed, arrival, outputs, record, as_json=as_json
        )
    )
