"""The command `fleet worker`."""

from __future__ import annotations

import ipaddress
import sys
from pathlib import Path
from typing import Annotated, Any

import typer


def worker(
    engines: Annotated[str | None, typer.Option(help="Engine to run; all that are installed when left out.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: a free one.")] = 8080,
    path: Annotated[str, typer.Option(help="Where requests are taken.")] = "/api/fleet/generate",
    slots: Annotated[int, typer.Option(min=1, max=64, help="Pictures to make at once.")] = 1,
    data_dir: Annotated[Path | None, typer.Option(help="Folder for the models and for work.")] = None,
    models_dir: Annotated[Path | None, typer.Option(help="Folder with checkpoints/ and loras/.")] = None,
    timeout_seconds: Annotated[float, typer.Option(min=1, help="Longest time for one picture.")] = 300,
    insecure_no_auth: Annotated[
        bool, typer.Option("--insecure-no-auth", help="Listen beyond this machine, though a worker asks for no key.")
    ] = False,
    ready_json: Annotated[bool, typer.Option("--json", help="Say as one line of JSON where it listens.")] = False,
) -> None:
    """Serve the HTTP interface of an SDXL-TRT worker (POST /api/fleet/generate, GET /health) over an engine of ours.

    It belongs to no fleet: whoever can reach it can use it.
    """
    if not insecure_no_auth and not _is_loopback(host):
        sys.stderr.write(f"a worker asks for no key: {host} needs --insecure-no-auth, or give --host 127.0.0.1\n")
        raise typer.Exit(2)
    from pydantic import ValidationError

    from fleet_agent.settings import AgentSettings
    from fleet_agent.worker.serve import serve

    given: dict[str, Any] = {"slots": slots, "engines": engines, "data_dir": data_dir, "models_dir": models_dir}
    try:
        settings = AgentSettings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        sys.stderr.write(f"{error}\n")
        raise typer.Exit(2) from None
    raise typer.Exit(serve(settings, host, port, path, timeout_seconds, ready_json=ready_json))


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
