"""`fleet deploy`, `containers`, `rm` and `logs`: containers on nodes."""

from __future__ import annotations

from contextlib import closing
from typing import Annotated, Any

import typer
from rich.text import Text

from fleet_client.calls import Json
from fleet_client.cli.bars import with_bars
from fleet_client.cli.console import (
    USAGE,
    JsonOption,
    KeyOption,
    UrlOption,
    errors_told,
    fail,
    out,
    print_json,
    print_line,
    print_table,
    say,
)
from fleet_client.cli.words import age, plain, state
from fleet_client.client import FleetCommander

NodeArgument = Annotated[str, typer.Argument(help="The node's name.")]
NameArgument = Annotated[str, typer.Argument(help="The container's name.")]


def deploy(
    node_id: NodeArgument,
    image: Annotated[str, typer.Argument(help="Such as registry:5000/myapp:latest.")],
    name: NameArgument,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port in the container to publish.")] = None,
    host_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port on the node; --port when left out.")
    ] = None,
    gpus: Annotated[bool, typer.Option("--gpus", help="All GPUs of the node.")] = False,
    mount: Annotated[
        list[str] | None, typer.Option("--mount", "-v", help="/host:/container or /host:/container:ro.")
    ] = None,
    env: Annotated[list[str] | None, typer.Option("--env", "-e", help="NAME=value.")] = None,
    label: Annotated[list[str] | None, typer.Option("--label", "-l", help="name=value.")] = None,
    command: Annotated[str | None, typer.Option(help="Split into words; the image's own when left out.")] = None,
    restart: Annotated[str | None, typer.Option(help="no, on_failure, always or unless_stopped.")] = None,
    cpus: Annotated[float | None, typer.Option(help="Most CPUs.")] = None,
    memory_bytes: Annotated[int | None, typer.Option("--memory", help="Most memory, in bytes.")] = None,
    pull: Annotated[str | None, typer.Option(help="missing, always or never.")] = None,
    username: Annotated[
        str | None, typer.Option(envvar="FLEET_REGISTRY_USERNAME", help="Login of the registry.")
    ] = None,
    password: Annotated[
        str | None, typer.Option(envvar="FLEET_REGISTRY_PASSWORD", help="Its password; better in the variable.")
    ] = None,
    request_id: Annotated[
        str | None, typer.Option("--request-id", help="Name of this call: given again, nothing is deployed again.")
    ] = None,
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Run a container on a node, and wait until it runs."""
    fields: dict[str, Any] = {
        "port": port,
        "host_port": host_port,
        "gpus": gpus,
        "mounts": mount or [],
        "env": pairs("--env", env),
        "labels": pairs("--label", label),
        "command": command,
        "restart_policy": restart,
        "cpus": cpus,
        "memory_bytes": memory_bytes,
        "pull": pull,
        "registry_auth": {"username": username, "password": password or ""} if username else None,
    }
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        container = with_bars(
            fleet,
            lambda drawn: fleet.deploy_container(node_id, image, name, request_id=request_id or drawn, **fields),
        )
    if as_json:
        print_json(container)
    else:
        out.print(_told(container), soft_wrap=True)


def containers(
    node_id: Annotated[str | None, typer.Argument(help="Only of this node.")] = None,
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """List containers of all nodes, or of one."""
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        reply = fleet.list_containers(node_id)
    if as_json:
        print_json(reply)
        return
    rows = [
        [
            plain(one["name"]),
            one["node_id"],
            state(one["status"]),
            plain(one["image"]),
            _port(one),
            age(one["create_time"]),
            "" if one["managed"] else "no",
        ]
        for one in reply["containers"]
    ]
    print_table(["CONTAINER", "NODE", "STATUS", "IMAGE", "PORT", "AGE", "OURS"], rows, "no containers")
    for silent in reply["unreachable_node_ids"]:
        say(f"{silent} did not answer", "yellow")


def remove(
    node_id: NodeArgument,
    name: NameArgument,
    grace: Annotated[
        int | None, typer.Option(min=0, max=600, help="Seconds between the stop signal and the kill.")
    ] = None,
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Stop and remove a container that the fleet deployed."""
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        container = fleet.remove_container(node_id, name, grace)
    if as_json:
        print_json(container)
    else:
        out.print(_told(container), soft_wrap=True)


def logs(
    node_id: NodeArgument,
    name: NameArgument,
    tail: Annotated[int, typer.Option(min=0, max=10_000, help="Last lines.")] = 100,
    since: Annotated[str | None, typer.Option(help="Not before this time, such as 2026-11-22T10:00:00Z.")] = None,
    until: Annotated[str | None, typer.Option(help="Before this time.")] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the container's end; its exit code is this command's.")
    ] = False,
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Print what a container writes; with --json one object a line."""
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        if not follow:
            for line in fleet.container_logs(node_id, name, tail, since=since, until=until)["lines"]:
                _print_line(line, as_json)
            return
        with closing(fleet.follow_container_logs(node_id, name, tail, since=since, until=until)) as entries:
            for entry in entries:
                if entry.get("line") is not None:
                    _print_line(entry["line"], as_json)
                elif entry.get("exit") is not None:
                    raise typer.Exit(entry["exit"]["exit_code"])


def pairs(option: str, given: list[str] | None) -> dict[str, str]:
    """NAME=value words by name; ends with a usage error where one is none."""
    found = {}
    for word in given or ():
        name, equals, value = word.partition("=")
        if not name or not equals:
            fail(f"{option}: {word!r} is not NAME=value", USAGE)
        found[name] = value
    return found


def _told(container: Json) -> Text:
    words = f"  {container['status']} on {container['node_id']}, {container['image']}{_port(container, ', port ')}"
    return Text.assemble((plain(container["name"]), "bold"), plain(words))


def _port(container: Json, before: str = "") -> str:
    if container["port"] is None:
        return ""
    return f"{before}{container['host_port']}:{container['port']}"


def _print_line(line: Json, as_json: bool) -> None:
    if as_json:
        print_line(line)
    else:
        out.print(Text(plain(line["text"]), style="yellow" if line["stream"] == "stderr" else ""), soft_wrap=True)
