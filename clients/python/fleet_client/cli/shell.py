"""`fleet exec`: a program on a node or in a container, on this terminal."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from fleet_client import terminal
from fleet_client.cli.console import USAGE, JsonOption, KeyOption, UrlOption, errors_told, fail, print_json
from fleet_client.cli.containers import NodeArgument, pairs
from fleet_client.client import FleetCommander


def execute(
    node_id: NodeArgument,
    words: Annotated[list[str], typer.Argument(metavar="-- COMMAND...", help="The program and its arguments.")],
    interactive: Annotated[bool, typer.Option("--interactive", "-i", help="Connect standard input.")] = False,
    tty: Annotated[bool, typer.Option("--tty", "-t", help="Give it a terminal.")] = False,
    container: Annotated[
        str | None, typer.Option("--container", "-c", help="In this container; on the node when left out.")
    ] = None,
    shell: Annotated[bool, typer.Option("--shell", help="Run by sh -c.")] = False,
    env: Annotated[list[str] | None, typer.Option("--env", "-e", help="NAME=value.")] = None,
    timeout_seconds: Annotated[
        int | None, typer.Option("--timeout", min=1, max=600, help="With --json: longest run in seconds.")
    ] = None,
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Run a program on a node or in a container; its exit code is this command's.

    `fleet exec -it NODE -- bash` is a shell there. With --json it runs to its end, and one object tells what came.
    """
    if words[0] == "--":
        words = words[1:]
    if not words:
        fail("COMMAND: name a program, as in `fleet exec NODE -- nvidia-smi`", USAGE)
    command = " ".join(words) if shell else shlex.join(words)
    variables = pairs("--env", env)
    with errors_told():
        if as_json:
            fields = {"container_name": container, "shell": shell, "env": variables, "timeout_seconds": timeout_seconds}
            with FleetCommander(url, api_key=api_key) as fleet:
                reply = fleet.exec(node_id, command, **fields)
            print_json(reply)
            raise typer.Exit(reply["exit_code"])
        program = terminal.Program(node_id, command, container, shell, tty, interactive, variables)
        code = terminal.run(url, api_key, program)
    raise typer.Exit(code)
