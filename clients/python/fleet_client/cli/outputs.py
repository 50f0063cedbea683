"""`fleet outputs` and `fleet input`: where outputs are, getting them there, and files for payloads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from fleet_client.calls import Json
from fleet_client.cli.bars import with_bars
from fleet_client.cli.console import (
    CONTEXT,
    FAILED,
    USAGE,
    JsonOption,
    KeyOption,
    UrlOption,
    errors_told,
    fail,
    out,
    print_fields,
    print_json,
    print_table,
    say,
)
from fleet_client.cli.words import age, plain, seconds, size
from fleet_client.client import FleetCommander

app = typer.Typer(help="See where outputs are; copy, clean up, star, remove, make again.", context_settings=CONTEXT)
inputs = typer.Typer(help="Bring files that payloads can name.", context_settings=CONTEXT)
FilenameArgument = Annotated[str, typer.Argument(help="A name of `fleet gallery`.")]
PrefixOption = Annotated[str, typer.Option(help="Only names that begin so, such as comfyui/.")]


@app.command("list")
def list_outputs(
    local: Annotated[bool, typer.Option("--local", help="What the server's folder holds, not the bucket.")] = False,
    prefix: PrefixOption = "",
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Most files to print.")] = 20,
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """List what S3, or the server's folder, really holds, newest first."""
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        page = fleet.list_outputs("local" if local else "s3", limit=limit, prefix=prefix or None)
    if as_json:
        print_json(page)
        return
    rows = [
        [
            one["filename"],
            size(one["size_bytes"]),
            age(one["create_time"]),
            " ".join(one["sources"]),
            one["s3_url"] or "",
        ]
        for one in page["outputs"]
    ]
    print_table(["FILE", "SIZE", "AGE", "IN", "URL"], rows, "no files there")
    if page["next_page_token"]:
        say(f"there are more: --limit {min(limit * 5, 1000)}")


@app.command()
def stats(as_json: JsonOption = False, url: UrlOption = None, api_key: KeyOption = None) -> None:
    """Tell how many outputs are where, and which cannot be copied to S3."""
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        reply = fleet.output_stats()
    if as_json:
        print_json(reply)
        return
    last = reply["last_sync"]
    print_fields(
        [
            *((name, _counted(reply[key])) for name, key in
              (("on the server's disk", "local"), ("in S3", "s3"), ("not in S3 yet", "unsynced"))),
            ("disk free", size(reply["disk_free_bytes"])),
            ("copied every", seconds(reply["sync_interval_seconds"])),
            ("local files kept", f"{reply['max_age_hours']:g} h, and until S3 verifiably has them"),
            ("last sync", f"{age(last['end_time'])} ago: {_summary(last)}" if last else "none yet"),
        ]
    )  # fmt: skip
    for failure in reply["failures"]:
        say(f"{failure['filename']}: {failure['reason']}, tried {failure['attempts']} times: {failure['detail']}")


def _counted(counts: Json) -> str:
    return f"{_files(counts['files'])}, {size(counts['size_bytes'])}"


@app.command()
def sync(as_json: JsonOption = False, url: UrlOption = None, api_key: KeyOption = None) -> None:
    """Copy outputs to S3 now."""
    _sweep(lambda fleet, request_id: fleet.sync_outputs(request_id), as_json, url, api_key)


@app.command()
def cleanup(
    max_age_hours: Annotated[float, typer.Option(help="Files younger than that stay.")] = 24,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would be removed.")] = False,
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Remove old local files that S3 verifiably has."""

    def work(fleet: FleetCommander, request_id: str) -> Json:
        return fleet.cleanup_outputs(max_age_hours, dry_run, request_id)

    _sweep(work, as_json, url, api_key)


@app.command()
def move(as_json: JsonOption = False, url: UrlOption = None, api_key: KeyOption = None) -> None:
    """Copy all outputs to S3, then remove the local files that it verifiably has."""
    _sweep(lambda fleet, request_id: fleet.move_outputs(request_id), as_json, url, api_key)


def _sweep(work: Callable[[FleetCommander, str], Json], as_json: bool, url: str | None, api_key: str | None) -> None:
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        sweep = with_bars(fleet, lambda request_id: work(fleet, request_id))
    if as_json:
        print_json(sweep)
    else:
        out.print(plain(_summary(sweep)), markup=False, soft_wrap=True)
        for failure in sweep["failures"]:
            say(f"{failure['filename']}: {failure['reason']}: {failure['detail']}")
    if sweep["failed"]:
        fail(f"{sweep['failed']} of {sweep['scanned']} files could not be done", FAILED)


def _summary(sweep: Json) -> str:
    removed = "would be removed" if sweep["dry_run"] else "removed"
    done = []
    if sweep["operation"] != "cleanup":
        done.append(f"{sweep['uploaded']} copied ({size(sweep['uploaded_bytes'])})")
    if sweep["operation"] != "sync":
        done.append(f"{sweep['deleted']} {removed} ({size(sweep['deleted_bytes'])})")
    return f"{_files(sweep['scanned'])}: {', '.join(done)}, {sweep['skipped']} left, {sweep['failed']} failed"


@app.command()
def show(
    filename: FilenameArgument, as_json: JsonOption = False, url: UrlOption = None, api_key: KeyOption = None
) -> None:
    """Tell where an output is and how it was made."""
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        output = fleet.get_output_metadata(filename)
    if as_json:
        print_json(output)
        return
    made = output["metadata"] or {}
    print_fields(
        [
            ("file", output["filename"]),
            ("size", size(output["size_bytes"])),
            ("in", " ".join(output["sources"])),
            ("URL", output["s3_url"]),
            ("sha256", output["sha256"]),
            ("star", "yes" if output["starred"] else None),
            ("seed", None if output["seed"] is None else str(output["seed"])),
            ("job", output["job_id"]),
            ("node", output["node_id"]),
            *((name, None if made.get(name) is None else str(made[name])) for name in
              ("prompt", "negative_prompt", "model", "resolved_model", "model_sha256", "steps", "guidance_scale",
               "scheduler", "engine", "engine_version")),
        ]
    )  # fmt: skip


@app.command()
def star(
    filename: FilenameArgument,
    off: Annotated[bool, typer.Option("--off", help="Take the star away.")] = False,
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Give an output a star; `fleet gallery --starred` lists those that have one."""
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        output = fleet.star_output(filename, not off)
    if as_json:
        print_json(output)
    else:
        say(f"{output['filename']} has {'a' if output['starred'] else 'no'} star")


@app.command()
def rm(
    filenames: Annotated[list[str], typer.Argument(metavar="FILE...", help="Names of `fleet gallery`.")],
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Remove outputs everywhere: disk, S3, gallery."""
    replies = []
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        for filename in filenames:
            reply = fleet.delete_output(filename)
            replies.append(reply)
            if not as_json:
                later = f"; as soon as it can be reached: {', '.join(reply['pending'])}" if reply["pending"] else ""
                out.print(plain(f"{filename}  removed{later}"), markup=False, soft_wrap=True)
    if as_json:
        print_json({"outputs": replies})


@app.command()
def rerun(
    filename: FilenameArgument,
    priority: Annotated[str, typer.Option(help="high, normal or low.")] = "normal",
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Make an output again from its record, seed included; prints the new job."""
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        receipt = fleet.rerun_output(filename, priority)
    if as_json:
        print_json(receipt)
    else:
        out.print(plain(receipt["job_id"]), markup=False, soft_wrap=True)


@inputs.command()
def upload(
    file: Annotated[Path, typer.Argument(help="The file.")],
    content_type: Annotated[str | None, typer.Option(help="Its media type, where its name does not tell.")] = None,
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Bring a file; prints the reference that payloads take, good for a day."""
    if not file.is_file():
        fail(f"{file} is no file", USAGE)
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        reply = fleet.upload_input(file, content_type=content_type)
    if as_json:
        print_json(reply)
    else:
        out.print(plain(reply["reference"]), markup=False, soft_wrap=True)


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"
