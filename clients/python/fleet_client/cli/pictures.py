"""`fleet gallery` and `fleet download`."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated

import typer

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
    write,
)
from fleet_client.cli.words import age, plain, shortened, size
from fleet_client.client import FleetCommander

STANDARD_OUTPUT = Path("-")
OutputOption = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="File or folder to write, - for standard output; its own name when left out."),
]


def gallery(
    prompt: Annotated[str | None, typer.Option(help="Only pictures whose prompt has these words.")] = None,
    model: Annotated[str | None, typer.Option(help="Only pictures by this model.")] = None,
    node: Annotated[str | None, typer.Option(help="Only pictures made on this node.")] = None,
    starred: Annotated[bool, typer.Option("--starred", help="Only pictures with a star.")] = False,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Most pictures to print.")] = 20,
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """List pictures, newest first; `fleet download` gets one."""
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        filters = {"prompt": prompt, "model": model, "node_id": node, "starred": starred or None}
        page = fleet.get_gallery(limit, **filters)
    if as_json:
        print_json(page)
        return
    rows = [
        [
            image["filename"],
            f"{image['width']}x{image['height']}",
            "" if image["seed"] is None else str(image["seed"]),
            age(image["create_time"]),
            shortened((image["metadata"] or {}).get("prompt") or "", 60),
        ]
        for image in page["images"]
    ]
    print_table(
        ["FILE", "SIZE", "SEED", "AGE", "PROMPT"], rows, 'no pictures: make one with `fleet generate "a sunset"`'
    )
    if page["next_page_token"]:
        say(f"there are more: --limit {min(limit * 5, 1000)}")


def download(
    filename: Annotated[str, typer.Argument(help="A name of `fleet gallery`.")],
    output: OutputOption = None,
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Get an output of the fleet."""
    target = destination(output)
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        data = fleet.get_output(filename)
        path = save(target, filename, data)
        if as_json and path is not None:
            print_json({**fleet.get_output_metadata(filename), "path": str(path)})
    if path is not None and not as_json:
        out.print(plain(f"{path}  {size(len(data))}"), markup=False, soft_wrap=True)


def destination(output: Path | None) -> Path | None:
    """Where the file is to go, None for the file's own name here. Fails now, not after the work, where it cannot."""
    if output is None or output == STANDARD_OUTPUT:
        return output
    folder = output if output.is_dir() else output.parent
    if not folder.is_dir():
        fail(f"--output: there is no folder {folder}", USAGE, f"Make it with `mkdir -p {folder}`.")
    if not os.access(output if output.exists() else folder, os.W_OK):
        fail(f"--output: {output} may not be written by you", USAGE)
    return output


def save(target: Path | None, filename: str, data: bytes) -> Path | None:
    """Writes the file whole or not at all; where it lies, None for standard output."""
    if target == STANDARD_OUTPUT:
        write(data)
        return None
    own = Path(filename).name
    path = Path(own) if target is None else target / own if target.is_dir() else target
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(data)
        else:
            _replace(path, data)
    except OSError as error:
        fail(f"{path} cannot be written: {error.strerror}", hint=f"Get it again with `fleet download {filename}`.")
    return path


def _replace(path: Path, data: bytes) -> None:
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask()
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            os.fchmod(file.fileno(), mode)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
