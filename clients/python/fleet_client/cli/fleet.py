"""`fleet status`, `models`, `gallery`, `events` and `version`."""

from __future__ import annotations

from importlib import metadata
from typing import Annotated

import typer

from fleet_client.cli.console import (
    JsonOption,
    KeyOption,
    UrlOption,
    err,
    errors_told,
    out,
    print_json,
    print_line,
    print_table,
)
from fleet_client.client import FleetCommander


def status(as_json: JsonOption = False, url: UrlOption = None, api_key: KeyOption = None) -> None:
    """How the fleet is."""
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        state = fleet.status()
    if as_json:
        print_json(state)
        return
    nodes, jobs = state["nodes"], state["jobs"]
    out.print(
        f"[bold]{state['status']}[/]  version {state['version']}, {state['mode']}, durability {state['durability']}"
    )
    out.print(f"nodes  {nodes['online']} online, {nodes['disconnected']} disconnected, {nodes['down']} down")
    out.print(
        f"jobs   {jobs['queued']} queued, {jobs['running']} running, "
        f"{jobs['succeeded']} succeeded, {jobs['failed']} failed"
    )
    for notice in state["notices"]:
        err.print(f"note: {notice}", style="yellow")


def models(as_json: JsonOption = False, url: UrlOption = None, api_key: KeyOption = None) -> None:
    """List checkpoints and LoRAs, and the nodes that have them."""
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        checkpoints, loras = fleet.list_models()["models"], fleet.list_loras()["loras"]
    if as_json:
        print_json({"models": checkpoints, "loras": loras})
        return
    rows = [
        [
            model["name"] + (" (default)" if model["is_default"] else ""),
            f"alias of {model['alias_of']}" if model["alias_of"] else model["architecture"] or "",
            ", ".join(model["node_ids"]),
            ", ".join(model["loaded_node_ids"]),
        ]
        for model in checkpoints
    ]
    rows += [[lora["name"], f"LoRA, {lora['architecture'] or '?'}", ", ".join(lora["node_ids"]), ""] for lora in loras]
    print_table(["MODEL", "KIND", "ON", "LOADED ON"], rows, "no models: no node has reported one")


def gallery(
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Most pictures to print.")] = 20,
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """List pictures, newest first."""
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        page = fleet.get_gallery(limit)
    if as_json:
        print_json(page)
        return
    rows = [
        [
            image["filename"],
            f"{image['width']}x{image['height']}",
            str(image["seed"]),
            ((image["metadata"] or {}).get("prompt") or "")[:60],
        ]
        for image in page["images"]
    ]
    print_table(["FILE", "SIZE", "SEED", "PROMPT"], rows, 'no pictures yet: make one with `fleet generate "a sunset"`')


def events(
    since: Annotated[str | None, typer.Option(help="Begin after this id; 0: all that is kept.")] = None,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Print what happens in the fleet, one JSON object a line, until Ctrl-C."""
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        for event in fleet.watch_events(since=since):
            print_line(event)


def version() -> None:
    """Print the version."""
    out.print(metadata.version("fleet-commander"))
