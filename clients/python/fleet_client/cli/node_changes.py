"""`fleet nodes`: what operators do with machines."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Annotated

import typer

from fleet_client.calls import Json
from fleet_client.cli.console import (
    FAILED,
    USAGE,
    JsonOption,
    KeyOption,
    UrlOption,
    errors_told,
    fail,
    print_json,
    say,
    write,
)
from fleet_client.cli.words import age, plain, seconds
from fleet_client.client import FleetCommander

NodeArgument = Annotated[str, typer.Argument(help="The node's name.")]
_WATCH_SECONDS = 1.0


def cordon(
    node_id: NodeArgument, as_json: JsonOption = False, url: UrlOption = None, api_key: KeyOption = None
) -> None:
    """Give a node no new work; what it runs goes on."""
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        _tell(fleet.cordon_node(node_id), f"{node_id} gets no new work", as_json)


def uncordon(
    node_id: NodeArgument, as_json: JsonOption = False, url: UrlOption = None, api_key: KeyOption = None
) -> None:
    """Give a node work again; ends a drain."""
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        _tell(fleet.uncordon_node(node_id), f"{node_id} gets work again", as_json)


def drain(
    node_id: NodeArgument,
    deadline_seconds: Annotated[
        int | None, typer.Option("--deadline", min=0, max=604_800, help="Seconds, then what is left is stopped.")
    ] = None,
    containers: Annotated[
        bool | None, typer.Option("--containers/--no-containers", help="Containers of the fleet's too.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until all work has really stopped.")] = False,
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Empty a node: no new work, its jobs end or go elsewhere, its containers stop."""
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        node = fleet.drain_node(node_id, deadline_seconds, containers)
        while wait and node["drain"] is not None and not node["drain"]["done"]:
            if not as_json:
                say(f"{node_id}: {_left(node['drain'])}")
            time.sleep(_WATCH_SECONDS)
            node = fleet.get_node(node_id)
        if wait and node["drain"] is None:
            fail(f"{node_id}: somebody has ended the drain", FAILED)
    _tell(node, f"{node_id}: {_left(node['drain'])}", as_json)


def label(
    node_id: NodeArgument,
    changes: Annotated[
        list[str] | None, typer.Argument(help="NAME=VALUE sets a label, NAME- takes it away; the others stay.")
    ] = None,
    clusters: Annotated[
        str | None, typer.Option(help="Clusters that it is to serve, parted by commas: all of them.")
    ] = None,
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Change labels or clusters of a node."""
    if not changes and clusters is None:
        fail("labels: give NAME=VALUE or NAME-, or --clusters", USAGE)
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        labels = _changed(fleet.get_node(node_id)["labels"], changes) if changes else None
        names = None if clusters is None else [name for name in clusters.replace(",", " ").split() if name]
        node = fleet.update_node(node_id, names, labels)
    words = ", ".join(f"{name}={value}" for name, value in node["labels"].items()) or "no labels"
    _tell(node, f"{node_id}: {words}; clusters {', '.join(node['clusters']) or 'none'}", as_json)


def remove(
    node_id: NodeArgument, as_json: JsonOption = False, url: UrlOption = None, api_key: KeyOption = None
) -> None:
    """Forget a node that is not online; its agent must join again."""
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        _tell(fleet.delete_node(node_id), f"{node_id} is forgotten", as_json)


def token(as_json: JsonOption = False, url: UrlOption = None, api_key: KeyOption = None) -> None:
    """Make a token with which one machine may join, for 15 minutes."""
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        made = fleet.create_join_token()
    if as_json:
        print_json(made)
        return
    write(made["token"] + "\n")
    say("On the machine that is to join, within 15 minutes:  fleet agent --join TOKEN", "bright_black")


def add(
    node_id: NodeArgument,
    address: Annotated[str, typer.Argument(help="USER@HOST or USER@HOST:PORT.")],
    host_key: Annotated[str, typer.Option(help="The host's public key, as in known_hosts: TYPE BASE64.")],
    clusters: Annotated[str, typer.Option(help="Clusters, parted by commas.")] = "",
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Add a node that is reached by SSH, without an agent."""
    user, at, place = address.rpartition("@")
    if not at:
        fail("address: must be USER@HOST or USER@HOST:PORT", USAGE)
    host, colon, port = place.rpartition(":")
    fields: Json = {"clusters": [name for name in clusters.replace(",", " ").split() if name]}
    if colon and port.isdigit() and "]" not in port:
        fields["port"] = int(port)
    else:
        host = place
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        node = fleet.create_node(node_id, host.strip("[]"), user, host_key, **fields)
    _tell(node, f"{node_id} is added: {user}@{place}", as_json)


def _tell(node: Json, words: str, as_json: bool) -> None:
    if as_json:
        print_json(node)
    else:
        say(plain(words))


def _left(drain: Json) -> str:
    if drain["done"]:
        return "drained, all work has stopped"
    jobs, containers = drain["remaining_jobs"], drain["remaining_containers"]
    left = f"{jobs} job{'' if jobs == 1 else 's'} and {containers} container{'' if containers == 1 else 's'} left"
    until = age(drain["deadline_time"])
    return f"draining: {left}" + (f", deadline passed {until} ago" if until != "0 s" else _deadline(drain))


def _deadline(drain: Json) -> str:
    left = (datetime.fromisoformat(drain["deadline_time"]) - datetime.now(UTC)).total_seconds()
    return f", deadline in {seconds(max(0.0, left))}"


def _changed(labels: dict[str, str], changes: list[str]) -> dict[str, str]:
    """Labels after the changes. Ends with a message for what is neither NAME=VALUE nor NAME-."""
    after = dict(labels)
    for change in changes:
        name, equals, value = change.partition("=")
        if equals and name:
            after[name] = value
        elif change.endswith("-") and len(change) > 1:
            after.pop(change[:-1], None)
        else:
            fail(f"labels: {change}: must be NAME=VALUE, or NAME- to take it away", USAGE)
    return after
