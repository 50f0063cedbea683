"""`fleet generate`: a prompt in, a picture out, with progress on the way."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from fleet_client.calls import Json, given
from fleet_client.cli.console import (
    UNREACHABLE,
    USAGE,
    JsonOption,
    KeyOption,
    UrlOption,
    err,
    errors_told,
    fail,
    out,
    print_json,
    say,
)
from fleet_client.cli.follow import follow
from fleet_client.cli.picture import can_show, draw
from fleet_client.cli.pictures import STANDARD_OUTPUT, OutputOption, destination, save
from fleet_client.cli.words import plain, seconds
from fleet_client.client import FleetCommander
from fleet_client.errors import ConnectionFailedError, FleetError, WaitTimeoutError


def generate(
    prompt: Annotated[str, typer.Argument(help="What to paint.")],
    output: OutputOption = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to avoid.", show_default="as the server")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels, a multiple of 8.", show_default="1024")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels, a multiple of 8.", show_default="1024")] = None,
    steps: Annotated[int | None, typer.Option(help="Inference steps.", show_default="20")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="CFG scale.", show_default="7.5")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same picture.", show_default="drawn")] = None,
    model: Annotated[str | None, typer.Option(help="One of `fleet models`.", show_default="the server's")] = None,
    lora: Annotated[list[str] | None, typer.Option(help="NAME or NAME:WEIGHT; may be given again.")] = None,
    init_image: Annotated[
        str | None, typer.Option(help="Picture to start from: output:FILE of the gallery, or job:ID.")
    ] = None,
    mask_image: Annotated[str | None, typer.Option(help="White is painted; as --init-image, which it needs.")] = None,
    strength: Annotated[
        float | None, typer.Option(help="How far from --init-image, 0 to 1.", show_default="0.75")
    ] = None,
    number: Annotated[int, typer.Option("-n", "--number", min=1, max=64, help="How many pictures.")] = 1,
    after: Annotated[list[str] | None, typer.Option(help="Job that must succeed first; may be given again.")] = None,
    priority: Annotated[str, typer.Option(help="high, normal or low.")] = "high",
    timeout: Annotated[
        float | None, typer.Option(min=1, help="Cancel it after so many seconds.", show_default="none")
    ] = None,
    preview: Annotated[bool, typer.Option("--preview/--no-preview", help="Show the picture in the terminal.")] = True,
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Make a picture, or several, and save them. Ctrl-C cancels the job."""
    if as_json and output == STANDARD_OUTPUT:
        fail("--json: standard output is taken by the picture", USAGE, "Leave out one of --json and -o -.")
    target = destination(output)
    if number > 1 and target is not None and target != STANDARD_OUTPUT and not target.is_dir():
        fail(
            f"--output: {target} is no folder, and there are {number} pictures",
            USAGE,
            "Give a folder, or leave it out.",
        )
    if number > 1 and target == STANDARD_OUTPUT:
        fail("--output: standard output holds one picture", USAGE, "Give a folder, or leave it out.")
    options: dict[str, Any] = {
        "negative_prompt": negative_prompt,
        "width": width,
        "height": height,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "seed": seed,
        "model": model,
        "loras": [_lora(text) for text in lora] if lora else None,
        "init_image": init_image,
        "mask_image": mask_image,
        "strength": strength,
        "n": number if number > 1 else None,
        "after": _parents(after or (), init_image, mask_image) or None,
        "priority": priority,
    }
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        job = _run(fleet, prompt, given(options), preview=preview, timeout_seconds=timeout)
        saved = []
        for made in job["result"]["outputs"]:
            data = fleet.get_output(made["filename"])
            path = save(target, made["filename"], data)
            saved.append({**made, "path": str(path)})
            if not as_json:
                _show(job, made, data, path, preview=preview)
    if as_json:
        print_json(saved[0] if number == 1 else saved)


def _show(job: Json, made: Json, data: bytes, path: Path | None, *, preview: bool) -> None:
    if preview and can_show(err):
        err.print(draw(data, err, spare_rows=2), end="")
    line = f"{path or made['filename']}  {_told(job, made)}"
    if path is None:
        say(line)
    else:
        out.print(plain(line), markup=False, soft_wrap=True)


def _parents(after: Sequence[str], *references: str | None) -> list[str]:
    """The jobs to wait for: those named, and those whose pictures are used."""
    used = [text.removeprefix("job:") for text in references if text is not None and text.startswith("job:")]
    return list(dict.fromkeys([*after, *used]))


def _run(fleet: FleetCommander, prompt: str, options: Json, *, preview: bool, timeout_seconds: float | None) -> Json:
    """Submits the job and follows it to its good end; cancels it when the person leaves or the time is over."""
    # With a request id of our own the job can be found even where Ctrl-C comes before its receipt.
    options = {**options, "request_id": str(uuid.uuid4())}
    receipt: Json | None = None
    try:
        receipt = fleet.queue_job(prompt, **options)
        return follow(fleet, receipt["job_id"], preview=preview, timeout_seconds=timeout_seconds)
    except (KeyboardInterrupt, WaitTimeoutError) as reason:
        with suppress(FleetError):
            job_id = (receipt or fleet.queue_job(prompt, **options))["job_id"]
            fleet.cancel_job(job_id)
            say(f"job {job_id} is cancelled")
        if isinstance(reason, WaitTimeoutError):
            fail(f"no picture within {timeout_seconds:g} s", hint="Look at `fleet status`, or give it more --timeout.")
        raise
    except ConnectionFailedError as error:
        if receipt is None:
            raise
        job_id = receipt["job_id"]
        fail(f"{error}; job {job_id} goes on without us", UNREACHABLE, f"See it end with `fleet jobs watch {job_id}`.")


def _told(job: Json, made: Json) -> str:
    took = job["timings"]["run_seconds"]
    parts = [f"{made['width']}x{made['height']}", f"seed {made['seed']}"]
    if took is not None:
        parts.append(f"{seconds(took)} on {job['node_id']}")
    return ", ".join(parts)


def _lora(text: str) -> Json:
    name, colon, weight = text.rpartition(":")
    if not colon:
        return {"name": text}
    try:
        return {"name": name, "weight": float(weight)}
    except ValueError:
        fail(f"--lora {text}: must be NAME or NAME:WEIGHT", USAGE)
