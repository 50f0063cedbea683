"""`fleet events`: what happens, as it happens."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

import typer
from rich.text import Text

from fleet_client.cli.console import JsonOption, KeyOption, UrlOption, errors_told, out, print_line
from fleet_client.cli.words import percent, place, plain, state
from fleet_client.client import FleetCommander
from fleet_client.events import Event


def events(
    kind: Annotated[
        list[str] | None, typer.Option("--type", help="Only these, such as job_complete; may be given again.")
    ] = None,
    job: Annotated[str | None, typer.Option(help="Only about this job.")] = None,
    node: Annotated[str | None, typer.Option(help="Only about this node.")] = None,
    since: Annotated[str | None, typer.Option(help="Begin after this id; 0: all that is kept.")] = None,
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Print what happens in the fleet, until Ctrl-C; with --json one object a line."""
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        for event in fleet.watch_events(type=kind, job_id=job, node_id=node, since=since):
            if as_json:
                print_line(event)
            else:
                out.print(_line(event), soft_wrap=True)


def _line(event: Event) -> Text:
    time = datetime.fromisoformat(event["time"]).astimezone().strftime("%H:%M:%S") if event["time"] else "--:--:--"
    line = Text().append(time, style="bright_black").append(f"  {plain(event['type']):<14}  ")
    data = event["data"]
    subject = data.get("job_id") or data.get("node_id") or data.get("service_id") or ""
    line.append(f"{plain(subject)}  ", style="bold")
    return line.append(_told(event["type"], data))


def _told(kind: str, data: Event) -> Text:
    if kind == "job_progress":
        steps = f", step {data['step']} of {data['steps']}" if data["steps"] else ""
        return Text(f"{percent(data['progress'])}{steps} on {plain(data['node_id'])}")
    if kind == "job_update":
        return Text(place(data))
    if kind == "job_complete":
        return state(data["status"], (data["error"] or {}).get("detail"))
    if kind == "node_update":
        return state(data["status"], "cordoned" if data["cordoned"] else None)
    if kind == "service_update":
        wanted = "" if data["replicas"] is None else f" of {data['replicas']}"
        return Text(plain(f"{data['name']}: {data['running_replicas']}{wanted} running, {data['image']}"))
    if kind == "gap":
        return Text("events were lost: look at the lists again", style="yellow")
    return Text(plain(data.get("status") or ""))
