"""The command `fleet`: what is here, and what installed packages bring in the entry-point group `fleet.commands`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module, metadata
from typing import Annotated, Any

import typer

from fleet_client.cli.console import CONTEXT, EXIT_CODES, INTERRUPTED, fail, out

COMMANDS_GROUP = "fleet.commands"
_OURS = {
    "generate": "generate:generate",
    "status": "fleet:status",
    "jobs": "queue:app",
    "nodes": "nodes:app",
    "node": "node_bootstrap:app",
    "models": "models:app",
    "loras": "models:loras",
    "services": "services:app",
    "deploy": "containers:deploy",
    "containers": "containers:containers",
    "rm": "containers:remove",
    "logs": "containers:logs",
    "exec": "shell:execute",
    "images": "services:images",
    "gallery": "pictures:gallery",
    "outputs": "outputs:app",
    "input": "outputs:inputs",
    "download": "pictures:download",
    "events": "events:events",
    "version": "fleet:version",
}
"""Our own, in the order of the help: the module beside this one, and the command or the group of commands in it."""
_CONTEXTS = {"exec": {"ignore_unknown_options": True, "allow_interspersed_args": False}}
"""Options after the node are the program's."""


def build(wanted: str | None = None) -> typer.Typer:
    """The command line: the whole of it, or as much as the command `wanted` needs.

    Modules of other commands are not even imported: they need libraries for terminals, pictures and servers.
    """
    app = typer.Typer(
        name="fleet",
        help="One address for all your GPU nodes: send a prompt, get the picture back.",
        epilog=EXIT_CODES,
        no_args_is_help=True,
        add_completion=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings=CONTEXT,
    )
    app.callback()(_options)
    brought = sorted(metadata.entry_points(group=COMMANDS_GROUP), key=lambda entry: entry.name)
    alone = wanted in {*_OURS, *(entry.name for entry in brought)}
    for name in _OURS:
        if not alone or wanted == name:
            _add(app, name)
    for entry in brought:
        if not alone or wanted == entry.name:
            app.command(entry.name, rich_help_panel="Run")(_load(entry))
    return app


def _add(app: typer.Typer, name: str) -> None:
    module, _, attribute = _OURS[name].partition(":")
    found: Any = getattr(import_module(f"fleet_client.cli.{module}"), attribute)
    if isinstance(found, typer.Typer):
        app.add_typer(found, name=name, rich_help_panel="Use")
    else:
        app.command(name, rich_help_panel="Use", context_settings=_CONTEXTS.get(name))(found)


def _version(asked: bool) -> None:
    if asked:
        from fleet_client.cli import fleet

        out.print(f"fleet {fleet.installed()}")
        raise typer.Exit


def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """One address for all your GPU nodes: send a prompt, get the picture back."""


def _load(entry: metadata.EntryPoint) -> Callable[..., None]:
    """The command of a package; of one that cannot be imported, a command that says so."""
    try:
        command: Callable[..., None] = entry.load()
    except Exception as error:
        reason = f"{entry.value} cannot be loaded: {type(error).__name__}: {error}"

        def broken() -> None:
            fail(reason, hint="Install Fleet Commander again.")

        broken.__doc__ = f"Broken: {reason}"
        return broken
    return command


def _wanted() -> str | None:
    """The command that is asked for; None where the shell asks for completions, or for help."""
    if "_FLEET_COMPLETE" in os.environ:
        return None
    first = sys.argv[1] if len(sys.argv) > 1 else ""
    return None if first.startswith("-") or not first else first


def main() -> None:
    """Entry point."""
    try:
        build(_wanted())(prog_name="fleet")
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
