"""`fleet services`: services of the swarm; `fleet images`: what the registry has."""

from __future__ import annotations

from contextlib import closing
from typing import Annotated

import typer
from rich.text import Text

from fleet_client.calls import Json
from fleet_client.cli.console import (
    CONTEXT,
    USAGE,
    JsonOption,
    KeyOption,
    UrlOption,
    errors_told,
    fail,
    out,
    print_fields,
    print_json,
    print_line,
    print_table,
)
from fleet_client.cli.words import age, plain, state
from fleet_client.client import FleetCommander

app = typer.Typer(no_args_is_help=True, help="Look at swarm services, and change them.", context_settings=CONTEXT)
ServiceArgument = Annotated[str, typer.Argument(help="The service's name or id.")]
RequestOption = Annotated[
    str | None, typer.Option("--request-id", help="Name of this change: given again, it is not made again.")
]


@app.command("list")
def list_services(as_json: JsonOption = False, url: UrlOption = None, api_key: KeyOption = None) -> None:
    """List the swarm's services."""
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        reply = fleet.list_services()
    if as_json:
        print_json(reply)
        return
    rows = [
        [
            plain(service["name"]),
            service["mode"],
            _replicas(service),
            plain(service["image"]),
            ", ".join(map(_port, service["ports"])),
            plain((service["update"] or {}).get("status", "")),
            service["service_id"],
        ]
        for service in reply["services"]
    ]
    columns = ["SERVICE", "MODE", "RUNNING", "IMAGE", "PORTS", "UPDATE", "ID"]
    print_table(columns, rows, "The swarm has no services: make one with `docker service create`.")


@app.command()
def show(
    service: ServiceArgument, as_json: JsonOption = False, url: UrlOption = None, api_key: KeyOption = None
) -> None:
    """Show a service and its tasks."""
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        found = fleet.get_service(service)
    if as_json:
        print_json(found)
        return
    update = found["update"]
    fields = [
        ("service", f"{found['name']} ({found['service_id']})"),
        ("image", found["image"]),
        ("running", _replicas(found)),
        ("autoscale", _rule(found["autoscale"])),
        ("update", f"{update['status']} {update['message']}".strip() if update else "none"),
        ("ports", ", ".join(map(_port, found["ports"])) or "none"),
        ("made", f"{age(found['create_time'])} ago"),
    ]
    print_fields([(name, plain(value)) for name, value in fields])
    rows: list[list[str | Text]] = [
        [
            task["task_id"],
            "" if task["slot"] is None else str(task["slot"]),
            plain(task["node_id"] or task["hostname"] or ""),
            state(task["status"]),
            task["desired_status"],
            age(task["update_time"]),
            plain(task["error"] or ""),
        ]
        for task in found["tasks"]
    ]
    out.print()
    print_table(["TASK", "SLOT", "NODE", "STATUS", "WANTED", "SINCE", "ERROR"], rows, "It has no tasks.")


@app.command()
def scale(
    service: ServiceArgument,
    replicas: Annotated[int, typer.Argument(min=0, max=1000, help="How many.")],
    request_id: RequestOption = None,
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Change the number of replicas; tasks that run are kept."""
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        _tell(fleet.scale_service(service, replicas, request_id), as_json)


@app.command()
def update(
    service: ServiceArgument,
    image: Annotated[str, typer.Argument(help="Such as registry:5000/sdxl:2.")],
    username: Annotated[
        str | None, typer.Option(envvar="FLEET_REGISTRY_USERNAME", help="Login of the registry.")
    ] = None,
    password: Annotated[
        str | None, typer.Option(envvar="FLEET_REGISTRY_PASSWORD", help="Its password; better in the variable.")
    ] = None,
    request_id: RequestOption = None,
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Give a service another image; its tasks are replaced as its update settings say."""
    if (username is None) != (password is None):
        fail("give both a user name and a password, or neither", USAGE)
    auth = None if username is None or password is None else {"username": username, "password": password}
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        _tell(fleet.update_service(service, image, auth, request_id), as_json)


@app.command()
def rollback(
    service: ServiceArgument,
    request_id: RequestOption = None,
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Undo the last change of a service."""
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        _tell(fleet.rollback_service(service, request_id), as_json)


@app.command()
def autoscale(
    service: ServiceArgument,
    most: Annotated[int, typer.Option("--max", min=0, max=1000, help="Never more replicas.")],
    least: Annotated[int, typer.Option("--min", min=0, max=1000, help="Never fewer replicas.")] = 0,
    jobs_per_replica: Annotated[
        int, typer.Option("--jobs-per-replica", min=1, help="How many waiting jobs make a replica.")
    ] = 1,
    cluster: Annotated[str | None, typer.Option(help="Only jobs of this cluster count.")] = None,
    job_type: Annotated[str | None, typer.Option("--type", help="Only jobs of this type, such as image_gen.")] = None,
    model: Annotated[str | None, typer.Option(help="Only jobs for this model.")] = None,
    off: Annotated[bool, typer.Option("--off", help="Keep the rule, and leave the service as it is.")] = False,
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Let a service grow and shrink with the jobs that wait."""
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        found = fleet.autoscale_service(
            service,
            most,
            min_replicas=least,
            jobs_per_replica=jobs_per_replica,
            target_cluster=cluster,
            job_type=job_type,
            target_model=model,
            enabled=not off,
        )
    _tell(found, as_json, _rule(found["autoscale"]))


@app.command()
def logs(
    service: ServiceArgument,
    tail: Annotated[int, typer.Option(min=0, max=10_000, help="Last lines.")] = 100,
    since: Annotated[str | None, typer.Option(help="Not before this time, such as 2026-11-22T10:00:00Z.")] = None,
    until: Annotated[str | None, typer.Option(help="Before this time.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the service is removed.")] = False,
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Print what the tasks of a service write; with --json one object a line."""
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        if not follow:
            for line in fleet.service_logs(service, tail, since=since, until=until):
                _print_line(line, as_json)
            return
        with closing(fleet.follow_service_logs(service, tail, since=since, until=until)) as lines:
            for line in lines:
                _print_line(line, as_json)


def images(as_json: JsonOption = False, url: UrlOption = None, api_key: KeyOption = None) -> None:
    """List the images of the fleet's registry, with their tags."""
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        reply = fleet.list_images()
    if as_json:
        print_json(reply)
        return
    rows = [[plain(image["name"]), plain(", ".join(image["tags"]))] for image in reply["images"]]
    print_table(["IMAGE", "TAGS"], rows, "The registry has no images.")


def _print_line(line: Json, as_json: bool) -> None:
    if as_json:
        print_line(line)
        return
    style = "yellow" if line["stream"] == "stderr" else ""
    out.print(
        Text.assemble((f"{line['task_id'] or 'swarm':<12}  ", "bright_black"), (plain(line["text"]), style)),
        soft_wrap=True,
    )


def _tell(service: Json, as_json: bool, more: str = "") -> None:
    if as_json:
        print_json(service)
        return
    words = f"{service['mode']}, {_replicas(service)}, {service['image']}"
    out.print(
        Text.assemble((plain(service["name"]), "bold"), f"  {plain(more or words)}"),
        soft_wrap=True,
    )


def _replicas(service: Json) -> str:
    running = service["running_replicas"]
    return str(running) if service["replicas"] is None else f"{running} of {service['replicas']}"


def _rule(rule: Json | None) -> str:
    if rule is None:
        return "none"
    which = [rule["target_cluster"], rule["job_type"], rule["target_model"]]
    jobs = ", ".join(word for word in which if word) or "any"
    text = f"{rule['min_replicas']} to {rule['max_replicas']}, one for {rule['jobs_per_replica']} waiting jobs ({jobs})"
    return text if rule["enabled"] else f"off ({text})"


def _port(port: Json) -> str:
    outside = "" if port["host_port"] is None else f"{port['host_port']}:"
    return f"{outside}{port['port']}/{port['protocol']}"
