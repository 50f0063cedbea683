"""`fleet jobs`: look at jobs, submit, watch, cancel, retry."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import orjson
import typer

from fleet_client.calls import Json
from fleet_client.cli.console import (
    USAGE,
    JsonOption,
    KeyOption,
    UrlOption,
    err,
    errors_told,
    fail,
    print_json,
    print_line,
    print_table,
)
from fleet_client.client import FleetCommander

app = typer.Typer(no_args_is_help=True, help="Look at jobs, submit, watch, cancel, retry.")
JobArgument = Annotated[str, typer.Argument(help="The job's id.")]


@app.command("list")
def list_jobs(
    status: Annotated[list[str] | None, typer.Option(help="Only these; may be given again.")] = None,
    job_type: Annotated[str | None, typer.Option(help="Only this type.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Most jobs to print.")] = 20,
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """List jobs, newest first."""
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        page = fleet.list_jobs(status=status, job_type=job_type, limit=limit)
    if as_json:
        print_json(page)
        return
    rows = [
        [
            job["job_id"],
            job["job_type"],
            job["status"] + (f" ({job['wait_reason']})" if job["wait_reason"] else ""),
            job["priority"],
            f"{job['progress']} %",
            job["node_id"] or "",
            job["create_time"][:19].replace("T", " "),
        ]
        for job in page["jobs"]
    ]
    print_table(["JOB", "TYPE", "STATUS", "PRIORITY", "DONE", "NODE", "CREATED (UTC)"], rows, "no jobs")
    if page["next_page_token"]:
        err.print(f"there are more: --limit {min(limit * 5, 1000)}")


@app.command()
def show(job_id: JobArgument, url: UrlOption = None, api_key: KeyOption = None) -> None:
    """Print one job as JSON."""
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        print_json(fleet.get_job(job_id))


@app.command()
def submit(
    file: Annotated[Path, typer.Argument(help="JSON file with a job, or a list of jobs; - for standard input.")],
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Submit a job as POST /api/queue/jobs takes it, or a list of them, all or none; prints the receipts."""
    try:
        jobs = orjson.loads(sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes())
    except OSError as error:
        fail(f"{file} cannot be read: {error.strerror}", USAGE)
    except orjson.JSONDecodeError as error:
        fail(f"{file} is no JSON: {error}", USAGE)
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        print_json(fleet.submit_batch(jobs) if isinstance(jobs, list) else fleet.submit_job(jobs))


@app.command()
def watch(job_id: JobArgument, as_json: JsonOption = False, url: UrlOption = None, api_key: KeyOption = None) -> None:
    """Follow a job to its end; the exit code is 0 where it succeeded."""
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        job: Json = {}
        for event in fleet.watch_job(job_id):
            job = event["data"]
            if as_json:
                print_line(event)
            else:
                err.print(f"{job.get('status', 'running')} {job['progress']} %")
        if job.get("status") != "succeeded":
            fail((job.get("error") or {}).get("detail") or f"job {job_id} is {job.get('status')}")


@app.command()
def cancel(job_id: JobArgument, as_json: JsonOption = False, url: UrlOption = None, api_key: KeyOption = None) -> None:
    """Cancel a job, queued or running."""
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        _tell(fleet.cancel_job(job_id), as_json)


@app.command()
def retry(job_id: JobArgument, as_json: JsonOption = False, url: UrlOption = None, api_key: KeyOption = None) -> None:
    """Run a failed job again."""
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        _tell(fleet.retry_job(job_id), as_json)


@app.command()
def stats(url: UrlOption = None, api_key: KeyOption = None) -> None:
    """Print depths, rates and waits as JSON."""
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        print_json(fleet.queue_stats())


def _tell(job: Json, as_json: bool) -> None:
    if as_json:
        print_json(job)
    else:
        err.print(f"{job['job_id']} is {job['status']}")
