"""`fleet generate`: a prompt in, a picture out, with progress on the way."""

from __future__ import annotations

import base64
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from fleet_client.calls import Json, given
from fleet_client.cli.console import USAGE, JsonOption, KeyOption, UrlOption, err, errors_told, fail, print_json
from fleet_client.cli.picture import can_show, draw
from fleet_client.client import FleetCommander
from fleet_client.errors import FleetError, JobFailedError

_PREVIEW_COLUMNS = 48


def generate(
    prompt: Annotated[str, typer.Argument(help="What to paint.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; its name in the fleet when left out.")
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to avoid.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.", show_default="1024")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.", show_default="1024")] = None,
    steps: Annotated[int | None, typer.Option(help="Inference steps.", show_default="20")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="CFG scale.", show_default="7.5")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same picture.", show_default="drawn")] = None,
    model: Annotated[str | None, typer.Option(help="One of `fleet models`.")] = None,
    lora: Annotated[list[str] | None, typer.Option(help="NAME or NAME:WEIGHT; may be given again.")] = None,
    priority: Annotated[str, typer.Option(help="high, normal or low.")] = "high",
    preview: Annotated[bool, typer.Option("--preview/--no-preview", help="Show the picture in the making.")] = True,
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Make a picture and save it. Ctrl-C cancels the job."""
    options: dict[str, Any] = {
        "negative_prompt": negative_prompt,
        "width": width,
        "height": height,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "seed": seed,
        "model": model,
        "loras": [_lora(text) for text in lora] if lora else None,
    }
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        receipt = fleet.queue_job(prompt, priority=priority, **given(options))
        job = _follow(fleet, receipt, preview and not as_json)
        made = job["result"]["outputs"][0]
        target = output or Path(made["filename"])
        if target.is_dir():
            target = target / made["filename"]
        data = fleet.get_output(made["filename"])
        try:
            target.write_bytes(data)
        except OSError as error:
            fail(f"{target} cannot be written: {error.strerror}; the picture is {made['filename']} in the fleet")
    if as_json:
        print_json({**made, "path": str(target)})
        return
    seconds = job["timings"]["run_seconds"]
    took = f", {seconds:.2f} s on {job['node_id']}" if seconds is not None else ""
    err.print(f"[bold]{target}[/]  {made['width']}x{made['height']}, seed {made['seed']}{took}")


def _lora(text: str) -> Json:
    name, colon, weight = text.rpartition(":")
    if not colon:
        return {"name": text}
    try:
        return {"name": name, "weight": float(weight)}
    except ValueError:
        fail(f"--lora {text}: must be NAME or NAME:WEIGHT", USAGE)


def _follow(fleet: FleetCommander, receipt: Json, preview: bool) -> Json:
    """Shows progress until the job has ended well; cancels it when the person leaves."""
    job_id = receipt["job_id"]
    show = preview and can_show(err)
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), console=err
    )
    task = progress.add_task("queued", total=100)
    picture: RenderableType | None = None
    try:
        with Live(progress, console=err, refresh_per_second=12, transient=True) as live:
            for event in fleet.watch_job(job_id, previews=show):
                data = event["data"]
                if event["type"] == "job_progress":
                    progress.update(task, completed=data["progress"], description=_step(data))
                    if data["preview"] is not None:
                        picture = draw(base64.b64decode(data["preview"]["data"]), min(_PREVIEW_COLUMNS, err.width))
                elif event["type"] == "job_update":
                    progress.update(task, completed=data["progress"], description=_place(data))
                elif event["type"] == "job_complete":
                    if data["status"] != "succeeded":
                        raise JobFailedError(data)
                    return dict(data)
                live.update(progress if picture is None else Group(picture, progress))
    except KeyboardInterrupt:
        with suppress(FleetError):
            fleet.cancel_job(job_id)
        raise
    raise FleetError(f"the server stopped telling about job {job_id}: look with `fleet jobs show {job_id}`")


def _step(progress: Json) -> str:
    return f"step {progress['step']}/{progress['steps']}" if progress["steps"] else "running"


def _place(job: Json) -> str:
    if job["status"] == "running":
        return f"running on {job['node_id']}"
    if job["wait_reason"]:
        return f"waiting: {job['wait_reason']}"
    return f"queued, place {job['queue_position']}" if job["queue_position"] else "queued"
