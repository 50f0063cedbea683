"""`fleet jobs pause`, `resume`, `dead`, `redrive`, `explain`: what holds jobs back, and what failed."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from fleet_client.calls import Json
from fleet_client.cli.console import (
    USAGE,
    JsonOption,
    KeyOption,
    UrlOption,
    errors_told,
    fail,
    out,
    print_json,
    print_table,
    say,
)
from fleet_client.cli.jobs import JobArgument, RequestOption, app
from fleet_client.cli.words import age, plain, seconds, shortened
from fleet_client.client import FleetCommander

__all__ = ["app"]
"""The commands of `fleet jobs`, these among them."""

ClusterOption = Annotated[str | None, typer.Option(help="Only this cluster.")]
TypeOption = Annotated[str | None, typer.Option(help="Only this type, such as image_gen.")]
PriorityOption = Annotated[str | None, typer.Option(help="Only high, normal or low.")]
ModelOption = Annotated[str | None, typer.Option(help="Only jobs for this model.")]
ReasonOption = Annotated[str | None, typer.Option(help="Only this reason, such as OUT_OF_MEMORY.")]


@app.command()
def pause(
    cluster: ClusterOption = None,
    job_type: TypeOption = None,
    priority: PriorityOption = None,
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Hold queued jobs back, all or those named; running ones go on, submits are accepted."""
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        _tell_pauses(fleet.pause_queue(target_cluster=cluster, job_type=job_type, priority=priority), as_json)


@app.command()
def resume(
    cluster: ClusterOption = None,
    job_type: TypeOption = None,
    priority: PriorityOption = None,
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """End a pause: the one that was made with just these options."""
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        _tell_pauses(fleet.resume_queue(target_cluster=cluster, job_type=job_type, priority=priority), as_json)


def _tell_pauses(reply: Json, as_json: bool) -> None:
    if as_json:
        print_json(reply)
        return
    rows = [
        [one["target_cluster"] or "any", one["job_type"] or "any", one["priority"] or "any", age(one["create_time"])]
        for one in reply["pauses"]
    ]
    print_table(["CLUSTER", "TYPE", "PRIORITY", "SINCE"], rows, "nothing is paused")


@app.command()
def dead(
    job_type: TypeOption = None,
    cluster: ClusterOption = None,
    model: ModelOption = None,
    reason: ReasonOption = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Most jobs to print.")] = 20,
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """List jobs that failed for good, newest end first; `fleet jobs redrive` runs them again."""
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        page = fleet.list_dead(
            job_type=job_type, target_cluster=cluster, target_model=model, reason=reason, limit=limit
        )
    if as_json:
        print_json(page)
        return
    rows = [
        [
            job["job_id"],
            job["job_type"],
            plain(job["error"]["reason"]),
            age(job["end_time"]),
            shortened(job["error"]["detail"], 60),
        ]
        for job in page["jobs"]
    ]
    print_table(["JOB", "TYPE", "REASON", "AGO", "DETAIL"], rows, "no job has failed for good")
    if page["next_page_token"]:
        say(f"there are more: --limit {min(limit * 5, 1000)}")


@app.command()
def redrive(
    job_ids: Annotated[list[str] | None, typer.Argument(help="Jobs; filters serve instead.")] = None,
    job_type: TypeOption = None,
    cluster: ClusterOption = None,
    model: ModelOption = None,
    reason: ReasonOption = None,
    limit: Annotated[int | None, typer.Option(min=1, max=1000, help="At most so many.", show_default="1000")] = None,
    request_id: RequestOption = None,
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Run failed jobs again, under their ids: those named, or those that fit. Exit code 1 where one could not be."""
    filters = {"job_type": job_type, "target_cluster": cluster, "target_model": model, "reason": reason}
    if not job_ids and not any(filters.values()):
        fail("no jobs are named", USAGE, "Give job ids, or a filter such as --reason OUT_OF_MEMORY.")
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        reply = fleet.redrive_jobs(job_ids or (), request_id, limit=limit, **filters)
    if as_json:
        print_json(reply)
    else:
        left = f", {reply['remaining']} are left" if reply["remaining"] else ""
        out.print(f"{reply['redriven']} run again{left}")
        for one in reply["failures"]:
            say(f"{one['job_id']}: {one['reason']}: {one['detail']}")
    if reply["failures"]:
        raise typer.Exit(1)


@app.command()
def explain(job_id: JobArgument, as_json: JsonOption = False, url: UrlOption = None, api_key: KeyOption = None) -> None:
    """Tell why a job waits, and what each node says to it."""
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        reply = fleet.explain_job(job_id)
    if as_json:
        print_json(reply)
        return
    out.print(Text(plain(reply["summary"]), style="bold"), soft_wrap=True)
    nodes = sorted(reply["nodes"], key=lambda node: (node["rank"] is None, node["rank"], node["node_id"]))
    rows = [
        [
            node["node_id"],
            Text("yes", style="green") if node["feasible"] else Text(plain(node["reason"] or "no"), style="yellow"),
            "" if node["rank"] is None else str(node["rank"]),
            "" if node["eta_seconds"] is None else seconds(node["eta_seconds"]),
            plain(node["detail"] or ""),
        ]
        for node in nodes
    ]
    if rows:
        print_table(["NODE", "CAN RUN IT", "RANK", "DONE IN", "DETAIL"], rows, "")
