"""`fleet jobs`: look at jobs, submit, watch, cancel, retry."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import orjson
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
    say,
)
from fleet_client.cli.follow import follow
from fleet_client.cli.words import age, percent, place, plain, rate, seconds, size, state
from fleet_client.client import FleetCommander

app = typer.Typer(no_args_is_help=True, help="Look at jobs, submit, watch, cancel, retry.", context_settings=CONTEXT)
JobArgument = Annotated[str, typer.Argument(help="The job's id.")]
RequestOption = Annotated[
    str | None, typer.Option(help="Idempotency key: the same key within 24 h gives the first reply again.")
]


@app.command("list")
def list_jobs(
    status: Annotated[
        list[str] | None, typer.Option(help="Only queued, running, succeeded, failed, cancelled; may be given again.")
    ] = None,
    job_type: Annotated[str | None, typer.Option(help="Only this type, such as image_gen.")] = None,
    priority: Annotated[str | None, typer.Option(help="Only high, normal or low.")] = None,
    node: Annotated[str | None, typer.Option(help="Only those on this node.")] = None,
    owner: Annotated[str | None, typer.Option(help="Only what this key submitted.")] = None,
    group: Annotated[str | None, typer.Option(help="The images of this group.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Most jobs to print.")] = 20,
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """List jobs, newest first; a group of images is one of them."""
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        page = fleet.list_jobs(
            status=status,
            job_type=job_type,
            priority=priority,
            node_id=node,
            owner=owner,
            group_job_id=group,
            limit=limit,
        )
    if as_json:
        print_json(page)
        return
    rows = [
        [
            job["job_id"],
            job["job_type"],
            state(job["status"], job["wait_reason"]),
            job["priority"],
            percent(job["progress"]),
            job["node_id"] or "",
            age(job["create_time"]),
        ]
        for job in page["jobs"]
    ]
    print_table(["JOB", "TYPE", "STATUS", "PRIORITY", "DONE", "NODE", "AGE"], rows, "no jobs")
    if page["next_page_token"]:
        say(f"there are more: --limit {min(limit * 5, 1000)}")


@app.command()
def show(job_id: JobArgument, as_json: JsonOption = False, url: UrlOption = None, api_key: KeyOption = None) -> None:
    """Tell all about one job."""
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        job = fleet.get_job(job_id)
    if as_json:
        print_json(job)
    else:
        print_fields(_fields(job))


def _fields(job: Json) -> list[tuple[str, str | Text | None]]:
    """A job for people."""
    payload = job["payload"] or {}
    names = sorted(payload, key=lambda name: (name != "prompt", name))
    result, error, timings = job["result"] or {}, job["error"], job["timings"]
    model = job["target_model"]
    if model and job["resolved_model"] and job["resolved_model"] != model:
        model = f"{model}, which is {job['resolved_model']}"
    where = place(job) if job["status"] in ("queued", "running") else job["status"]
    took = [f"{name} {seconds(timings[f'{name}_seconds'])}" for name in ("queued", "load", "run", "upload")
            if timings[f"{name}_seconds"] is not None]  # fmt: skip
    limits = f"{job['attempt']} of at most {job['max_retries'] + 1}, each up to {seconds(job['timeout_seconds'])}"
    return [
        ("job", Text(job["job_id"], style="bold")),
        ("status", Text.assemble(state(job["status"]), "" if where == job["status"] else f", {where}")),
        ("error", Text(plain(f"{error['reason']}: {error['detail']}"), style="red") if error else None),
        ("type", f"{job['job_type']}, priority {job['priority']}, cluster {job['target_cluster']}"),
        ("owner", job["owner"]),
        ("after", "\n".join(job["after"])),
        ("group", job["group_job_id"]),
        ("images", f"{len(job['child_job_ids'])} jobs" if job["child_job_ids"] else None),
        ("model", model),
        ("node", job["node_id"]),
        ("progress", percent(job["progress"]) + (f", step {job['step']} of {job['steps']}" if job["steps"] else "")),
        ("to go", seconds(job["eta_seconds"]) if job["eta_seconds"] is not None else None),
        ("attempts", limits),
        ("created", f"{job['create_time'][:19].replace('T', ' ')} UTC, {age(job['create_time'])} ago"),
        ("took", ", ".join(took)),
        ("callback", job["callback_url"]),
        ("payload", "\n".join(f"{name}: {_value(payload[name])}" for name in names)),
        ("text", result.get("text")),
        ("outputs", "\n".join(f"{one['filename']}  {size(one['size_bytes'])}" for one in result.get("outputs", ()))),
    ]


def _value(value: Any) -> str:
    return value if isinstance(value, str) else orjson.dumps(value).decode()


@app.command()
def submit(
    file: Annotated[Path, typer.Argument(help="JSON file with a job, or a list of jobs; - for standard input.")],
    request_id: RequestOption = None,
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Submit a job as POST /api/queue/jobs takes it, or a list of up to 1,000 of them, all or none."""
    jobs = _jobs_of(file)
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        if isinstance(jobs, list):
            receipts = fleet.submit_batch(jobs, request_id)
            reply: Any = {"jobs": receipts}
        else:
            reply = fleet.submit_job({**jobs, "request_id": request_id} if request_id else jobs)
            receipts = [reply]
    if as_json:
        print_json(reply)
        return
    for receipt in receipts:
        out.print(Text.assemble((plain(receipt["job_id"]), "bold"), "  ", place(receipt)), soft_wrap=True)


def _jobs_of(file: Path) -> Json | list[Json]:
    """The job or the jobs of a file; ends the command where it holds none."""
    try:
        content = orjson.loads(sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes())
    except OSError as error:
        fail(f"{file} cannot be read: {error.strerror}", USAGE)
    except orjson.JSONDecodeError as error:
        fail(f"{file} is no JSON: {error}", USAGE)
    if isinstance(content, dict) and isinstance(content.get("jobs"), list) and "job_type" not in content:
        content = content["jobs"]
    example = 'A job is such as {"job_type": "image_gen", "payload": {"prompt": "a sunset"}}.'
    for index, job in enumerate(content if isinstance(content, list) else [content]):
        if not isinstance(job, dict):
            fail(f"{file}: {f'jobs[{index}]' if isinstance(content, list) else 'it'} is no object", USAGE, example)
    jobs: Json | list[Json] = content
    return jobs


@app.command()
def watch(job_id: JobArgument, as_json: JsonOption = False, url: UrlOption = None, api_key: KeyOption = None) -> None:
    """Follow a job to its end; the exit code is 0 where it succeeded. With --json one event a line.

    Ctrl-C leaves; the job goes on.
    """
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        job = follow(fleet, job_id, preview=True, also=print_line if as_json else None)
    if not as_json:
        made = ", ".join(output["filename"] for output in job["result"]["outputs"])
        out.print(Text.assemble((job_id, "bold"), "  ", state(job["status"]), f"  {plain(made)}"), soft_wrap=True)


@app.command()
def cancel(job_id: JobArgument, as_json: JsonOption = False, url: UrlOption = None, api_key: KeyOption = None) -> None:
    """Cancel a job, queued or running."""
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        _tell(fleet.cancel_job(job_id), as_json)


@app.command()
def retry(
    job_id: JobArgument,
    request_id: RequestOption = None,
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Run a failed job again, under the same id."""
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        _tell(fleet.retry_job(job_id, request_id), as_json)


@app.command()
def deliveries(
    job_id: JobArgument, as_json: JsonOption = False, url: UrlOption = None, api_key: KeyOption = None
) -> None:
    """List a job's callbacks, newest first, and what came of them."""
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        reply = fleet.list_deliveries(job_id)
    if as_json:
        print_json(reply)
        return
    rows = []
    for delivery in reply["deliveries"]:
        tries = delivery["attempts"]
        last = tries[-1]["detail"] if tries else ""
        rows.append([delivery["delivery_id"], delivery["status"], str(len(tries)), plain(last), plain(delivery["url"])])
    print_table(["DELIVERY", "STATUS", "TRIES", "LAST", "URL"], rows, "The job has no callbacks so far.")


@app.command()
def redeliver(
    job_id: JobArgument,
    delivery_id: Annotated[str, typer.Argument(help="From `fleet jobs deliveries`.")],
    request_id: RequestOption = None,
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Send a callback again, at once."""
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        delivery = fleet.redeliver(job_id, delivery_id, request_id)
    if as_json:
        print_json(delivery)
    else:
        out.print(Text.assemble((delivery["delivery_id"], "bold"), "  ", delivery["status"]), soft_wrap=True)


@app.command()
def stats(as_json: JsonOption = False, url: UrlOption = None, api_key: KeyOption = None) -> None:
    """Depths, rates and waits of the queue."""
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        reply = fleet.queue_stats()
    if as_json:
        print_json(reply)
        return
    by_priority = ", ".join(f"{count} {word}" for word, count in reply["queued_by_priority"].items())
    print_fields(
        [
            ("jobs", ", ".join(f"{count} {word}" for word, count in reply["jobs"].items())),
            ("queued", by_priority),
            ("empty in", seconds(reply["eta_seconds"])),
            (f"in the last {seconds(reply['window_seconds'])}", _rates(reply)),
            ("waited", _quantiles(reply["wait_seconds"])),
            ("ran", _quantiles(reply["run_seconds"])),
        ]
    )
    for one in reply["pauses"]:
        words = (one["target_cluster"], one["job_type"], one["priority"])
        say(f"paused for {age(one['create_time'])}: {', '.join(word for word in words if word) or 'all'}")
    rows = [
        [
            lane["target_cluster"],
            lane["job_type"] + (" (paused)" if lane["paused"] else ""),
            lane["target_model"] or "",
            str(lane["queued"]),
            str(lane["running"]),
            seconds(lane["oldest_queued_seconds"]),
        ]
        for lane in reply["lanes"]
    ]
    if rows:
        out.print()
        print_table(["CLUSTER", "TYPE", "MODEL", "QUEUED", "RUNNING", "OLDEST"], rows, "")


def _rates(reply: Json) -> str:
    return f"{rate(reply['submitted_per_second'])} submitted, {rate(reply['ended_per_second'])} ended"


def _quantiles(values: Json) -> str:
    return f"{seconds(values['p50'])} at the median, {seconds(values['p95'])} at 95 %, {seconds(values['p99'])} at 99 %"


def _tell(job: Json, as_json: bool) -> None:
    if as_json:
        print_json(job)
    else:
        out.print(Text.assemble((plain(job["job_id"]), "bold"), "  ", state(job["status"])), soft_wrap=True)
