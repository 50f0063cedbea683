"""The command `fleet`: what is here, and what installed packages bring in the entry-point group `fleet.commands`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import metadata

import typer

from fleet_client.cli import fleet, generate, jobs, nodes
from fleet_client.cli.console import USAGE, fail

COMMANDS_GROUP = "fleet.commands"


def build() -> typer.Typer:
    """The whole command line."""
    app = typer.Typer(
        name="fleet",
        help="One address for all your GPU nodes: send a prompt, get the picture back.",
        no_args_is_help=True,
        add_completion=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
    )
    for entry in sorted(metadata.entry_points(group=COMMANDS_GROUP), key=lambda entry: entry.name):
        app.command(entry.name, rich_help_panel="Run")(_load(entry))
    app.command("generate", rich_help_panel="Use")(generate.generate)
    app.command("status", rich_help_panel="Use")(fleet.status)
    app.command("gallery", rich_help_panel="Use")(fleet.gallery)
    app.command("models", rich_help_panel="Use")(fleet.models)
    app.command("events", rich_help_panel="Use")(fleet.events)
    app.add_typer(jobs.app, name="jobs", rich_help_panel="Use")
    app.add_typer(nodes.app, name="nodes", rich_help_panel="Use")
    app.command("version", rich_help_panel="Use")(fleet.version)
    return app


def _load(entry: metadata.EntryPoint) -> Callable[..., None]:
    """The command of a package; of one that cannot be imported, a command that says so."""
    try:
        command: Callable[..., None] = entry.load()
    except Exception as error:
        reason = f"{entry.value} cannot be loaded: {type(error).__name__}: {error}"

        def broken() -> None:
            fail(reason)

        broken.__doc__ = f"Broken: {reason}"
        return broken
    return command


def main() -> None:
    """Entry point."""
    try:
        build()()
    except BrokenPipeError:
        # The reader of our output has gone, as in `fleet jobs | head`.
        sys.stderr.close()
        raise SystemExit(USAGE) from None
