"""`fleet nodes`: the machines."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from fleet_client.calls import Json
from fleet_client.cli import node_changes
from fleet_client.cli.console import (
    CONTEXT,
    JsonOption,
    KeyOption,
    UrlOption,
    errors_told,
    print_fields,
    print_json,
    print_table,
)
from fleet_client.cli.plots import sparkline
from fleet_client.cli.words import age, percent, plain, seconds, size, state
from fleet_client.client import FleetCommander

app = typer.Typer(no_args_is_help=True, help="Look at nodes, and look after them.", context_settings=CONTEXT)
for _name, _command in (
    ("cordon", node_changes.cordon),
    ("uncordon", node_changes.uncordon),
    ("drain", node_changes.drain),
    ("label", node_changes.label),
    ("rm", node_changes.remove),
    ("token", node_changes.token),
    ("add", node_changes.add),
):
    app.command(_name)(_command)
_COLUMNS = 60


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
            state(node["status"], _held_back(node)),
            f"{node['slots_free']} of {node['slots']}",
            ", ".join(node["job_types"]),
            ", ".join(gpu["name"] for gpu in node["gpus"]) or "none",
            _load(node),
            ", ".join(node["loaded_models"]),
        ]
        for node in reply["nodes"]
    ]
    columns = ["NODE", "STATUS", "FREE", "RUNS", "GPUS", "LOAD", "LOADED"]
    print_table(columns, rows, "no nodes: start one with `fleet agent`")


@app.command()
def show(
    node_id: Annotated[str, typer.Argument(help="The node's name.")],
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Tell all about one node."""
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        node = fleet.get_node(node_id)
        past = [] if as_json else fleet.node_heartbeats(node_id, 60)["heartbeats"]
    if as_json:
        print_json(node)
    else:
        print_fields([*_fields(node), *_plots(past)])


def _plots(past: list[Json]) -> list[tuple[str, str | Text | None]]:
    """The last hour, a line for each reading."""
    if len(past) < 2:
        return []
    rows: list[tuple[str, list[float | None]]] = [("CPU %", [_of(beat["host"], "cpu_percent") for beat in past])]
    for gpu in past[-1]["gpus"]:
        index = gpu["index"]
        seen = [next((one for one in beat["gpus"] if one["index"] == index), None) for beat in past]
        rows.append((f"GPU {index} %", [_of(one, "utilization_percent") for one in seen]))
        rows.append((f"GPU {index} VRAM %", [_share(one) for one in seen]))
        rows.append((f"GPU {index} °C", [_of(one, "temperature_celsius") for one in seen]))
    width = max(len(name) for name, _ in rows)
    lines = [
        f"{name:<{width}} {line}" for name, values in rows if (line := sparkline(values, width=_COLUMNS, high=100.0))
    ]
    return [("last hour", Text("\n".join(lines)))] if lines else []


def _of(readings: Json | None, name: str) -> float | None:
    return None if readings is None else readings[name]


def _share(gpu: Json | None) -> float | None:
    if gpu is None or not gpu["memory_total_bytes"] or gpu["memory_used_bytes"] is None:
        return None
    return float(100 * gpu["memory_used_bytes"] / gpu["memory_total_bytes"])


def _fields(node: Json) -> list[tuple[str, str | Text | None]]:
    """A node for people."""
    host = node["host"] or {}
    engines = [
        f"{engine['name']} {engine['version'] or ''}: {engine['status']}"
        + (f", {engine['detail']}" if engine["detail"] else "")
        for engine in node["engines"]
    ]
    memory = f"{size(host.get('memory_used_bytes'))} of {size(host.get('memory_total_bytes'))} memory"
    disk = f"{size(host.get('disk_free_bytes'))} of {size(host.get('disk_total_bytes'))} disk free"
    load = f"{host.get('cpu_count')} CPUs, {percent(host.get('cpu_percent'))} busy"
    return [
        ("node", Text(plain(node["node_id"]), style="bold")),
        ("status", state(node["status"], _held_back(node))),
        (
            "machine",
            f"{node['hostname'] or '?'}, {node['os'] or '?'} {node['arch'] or ''}, agent {node['agent_version']}",
        ),
        ("heartbeat", f"{age(node['heartbeat_time'])} ago"),
        ("connected", f"for {age(node['connect_time'])}" if node["status"] == "online" else None),
        ("up for", seconds(host["uptime_seconds"]) if host.get("uptime_seconds") is not None else None),
        ("clusters", ", ".join(node["clusters"])),
        ("labels", ", ".join(f"{name}={value}" for name, value in node["labels"].items())),
        ("slots", f"{node['slots_free']} of {node['slots']} free"),
        ("running", "\n".join(node["running_job_ids"])),
        ("engines", "\n".join(engines)),
        ("loaded", ", ".join(node["loaded_models"])),
        ("host", "\n".join((load, memory, disk)) if host else None),
        ("gpus", "\n".join(_gpu(gpu) for gpu in node["gpus"]) or "none"),
        ("warnings", Text(plain("; ".join(node["warnings"])), style="yellow") if node["warnings"] else None),
    ]


def _held_back(node: Json) -> str | None:
    """Why it gets no new work."""
    if node["drain"] is not None:
        return "drained" if node["drain"]["done"] else "draining"
    return "cordoned" if node["cordoned"] else None


def _gpu(gpu: Json) -> str:
    parts = [f"{gpu['index']}: {gpu['name']}", f"{percent(gpu['utilization_percent'])} busy"]
    if gpu["memory_total_bytes"] is not None:
        parts.append(f"{size(gpu['memory_used_bytes'])} of {size(gpu['memory_total_bytes'])}")
    if gpu["temperature_celsius"] is not None:
        parts.append(f"{gpu['temperature_celsius']:.0f} °C")
    if gpu["power_watts"] is not None:
        parts.append(f"{gpu['power_watts']:.0f} W")
    return ", ".join(parts)


def _load(node: Json) -> str:
    """The busiest reading that the node gives."""
    readings = [gpu["utilization_percent"] for gpu in node["gpus"] if gpu["utilization_percent"] is not None]
    if readings:
        return f"GPU {percent(max(readings))}"
    host = node["host"]
    return f"CPU {percent(host['cpu_percent'])}" if host and host["cpu_percent"] is not None else ""
