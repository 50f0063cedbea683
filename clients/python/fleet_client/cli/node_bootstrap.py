"""`fleet node bootstrap USER@HOST`: a machine with SSH and Python becomes a node."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from fleet_client.cli.console import (
    CONTEXT,
    FAILED,
    JsonOption,
    KeyOption,
    UrlOption,
    err,
    errors_told,
    fail,
    print_json,
)
from fleet_client.client import FleetCommander
from fleet_client.errors import ApiError, FleetError

app = typer.Typer(no_args_is_help=True, help="Make a machine a node.", context_settings=CONTEXT)
_ONLINE_SECONDS = 180.0
"""A small machine that has other work needs a minute to import what the agent is made of."""


@app.callback()
def _group() -> None:
    """Make a machine a node."""


@app.command()
def bootstrap(
    target: Annotated[str, typer.Argument(metavar="USER@HOST", help="Where to; the host needs SSH and Python alone.")],
    port: Annotated[int, typer.Option(min=1, max=65535, help="Its SSH port.")] = 22,
    identity: Annotated[list[Path] | None, typer.Option(help="Private key to log in with; else the agent's.")] = None,
    host_key: Annotated[
        str | None, typer.Option(help="The host's public key, TYPE BASE64; else it must be in known_hosts.")
    ] = None,
    node_id: Annotated[str | None, typer.Option(help="The node's name; the host's name when left out.")] = None,
    slots: Annotated[int | None, typer.Option(min=1, max=64, help="Jobs that it runs at once.")] = None,
    clusters: Annotated[str | None, typer.Option(help="Clusters to serve, parted by commas.")] = None,
    labels: Annotated[str | None, typer.Option(help="Labels, name=value parted by commas.")] = None,
    server: Annotated[
        str | None, typer.Option(help="The server's gRPC address as the host sees it; else as the join token says.")
    ] = None,
    wheels: Annotated[
        Path | None, typer.Option(help="Folder of wheels for a host with another Python or processor than this one.")
    ] = None,
    folder: Annotated[str | None, typer.Option(help="Where it is put.", show_default="~/.fleet-agent")] = None,
    systemd: Annotated[
        bool, typer.Option("--systemd/--no-systemd", help="Install a unit; without, the agent is just started.")
    ] = True,
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Copy Fleet Commander to a host, start its agent, and wait until the node is online.

    Safe to run again: what is there already is left alone, a newer release takes the place of the one that runs.
    """
    from fleet_client.bootstrap.host import HostError, Target, connected
    from fleet_client.bootstrap.install import Outcome, Plan, install
    from fleet_client.bootstrap.wheels import WheelError, WheelSet, own_wheels

    given = {"NODE_ID": node_id, "SLOTS": slots, "CLUSTERS": clusters, "LABELS": labels, "SERVER": server}
    environment = {f"FLEET_AGENT_{name}": str(value) for name, value in given.items() if value is not None}
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet, contextlib.ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fleet-wheels-")))
        bar = stack.enter_context(_bar())
        task = bar.add_task("packing wheels", total=None)
        try:
            where = Target.of(target, port=port, host_key=host_key, identities=identity or [])
            bundle = WheelSet.of(wheels) if wheels is not None else own_wheels(place)
            total = sum(path.stat().st_size for path in bundle.files)
            plan = Plan(bundle, environment, folder, systemd, lambda: _token(fleet, server))

            async def work() -> Outcome:
                async with connected(where) as host:
                    bar.update(task, total=total)
                    return await install(
                        host,
                        plan,
                        lambda words: bar.update(task, description=words),
                        lambda count: bar.advance(task, count),
                    )

            outcome = asyncio.run(work())
        except (HostError, WheelError, ValueError) as error:
            bar.stop()
            fail(str(error), FAILED)
        bar.update(task, description="waiting for the node")
        _await_online(fleet, outcome.node_id)
    told = {"node_id": outcome.node_id, "release": outcome.release, "changed": list(outcome.changed)}
    if as_json:
        print_json(told)
    else:
        words = ", ".join(outcome.changed) or "nothing had to be changed"
        err.print(f"{outcome.node_id} is online ({words})", markup=False)


def _token(fleet: FleetCommander, server: str | None) -> str | None:
    """A join token; None where the server needs none, and then its address must be given."""
    try:
        token = fleet.create_join_token()["token"]
    except ApiError as error:
        if error.reason != "TLS_OFF":
            raise
        if server is None:
            fail("the server listens on loopback alone: start it with --lan, or name a way to it with --server", FAILED)
        return None
    return str(token)


def _await_online(fleet: FleetCommander, node_id: str) -> None:
    until = time.monotonic() + _ONLINE_SECONDS
    while True:
        lost: FleetError | None = None
        try:
            if fleet.get_node(node_id)["status"] == "online":
                return
        except ApiError:
            # The server does not know it yet.
            pass
        except FleetError as error:
            # One call that fails is no reason to give up what is nearly done.
            lost = error
        if time.monotonic() > until:
            if lost is not None:
                raise lost
            fail(
                f"{node_id} has been installed and started, but has not come online: look at its log "
                "(journalctl -u fleet-agent, or agent.log in its folder)",
                FAILED,
            )
        time.sleep(0.2)


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), console=err, disable=not err.is_terminal
    )
