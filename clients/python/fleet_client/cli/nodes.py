"""`fleet nodes`: the machines."""

from __future__ import annotations

from typing import Annotated

import typer

from fleet_client.calls import Json
from fleet_client.cli.console import JsonOption, KeyOption, UrlOption, errors_told, print_json, print_table
from fleet_client.client import FleetCommander

app = typer.Typer(no_args_is_help=True, help="Look at nodes.")


@app.command("list")
def list_nodes(as_json: JsonOption = False, url: UrlOption = None, api_key: KeyOption = None) -> None:
    """List all nodes."""
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        reply = fleet.list_nodes()
    if as_json:
        print_json(reply)
        return
    rows = [
        [
            node["node_id"],
            node["status"] + (", cordoned" if node["cordoned"] else ""),
            f"{node['slots_free']}/{node['slots']}",
            ", ".join(node["job_types"]),
            ", ".join(gpu["name"] for gpu in node["gpus"]) or "no GPU",
            _load(node),
            ", ".join(node["loaded_models"]),
        ]
        for node in reply["nodes"]
    ]
    columns = ["NODE", "STATUS", "FREE", "RUNS", "GPUS", "LOAD", "LOADED"]
    print_table(columns, rows, "no nodes: start one with `fleet agent`")


@app.command()
def show(
    node_id: Annotated[str, typer.Argument(help="The node's name.")], url: UrlOption = None, api_key: KeyOption = None
) -> None:
    """Print one node as JSON."""
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        print_json(fleet.get_node(node_id))


def _load(node: Json) -> str:
    """The busiest reading that the node gives."""
    readings = [gpu["utilization_percent"] for gpu in node["gpus"] if gpu["utilization_percent"] is not None]
    if readings:
        return f"GPU {max(readings):.0f} %"
    host = node["host"]
    return f"CPU {host['cpu_percent']:.0f} %" if host and host["cpu_percent"] is not None else ""
