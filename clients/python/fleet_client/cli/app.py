"""The command `fleet`: what is here, and what installed packages bring in the entry-point group `fleet.commands`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Annotated

import typer

from fleet_client.cli import (
    containers,
    events,
    fleet,
    generate,
    models,
    node_bootstrap,
    nodes,
    outputs,
    pictures,
    queue,
    services,
    shell,
)
from fleet_client.cli.console import CONTEXT, EXIT_CODES, INTERRUPTED, fail, out

COMMANDS_GROUP = "fleet.commands"


def build(wanted: str | None = None) -> typer.Typer:
    """The command line: the whole of it, or as much as the command `wanted` needs.

    What packages bring is imported for its own commands and where all are listed, not for each of ours.
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
    app.command("generate", rich_help_panel="Use")(generate.generate)
    app.command("status", rich_help_panel="Use")(fleet.status)
    app.add_typer(queue.app, name="jobs", rich_help_panel="Use")
    app.add_typer(nodes.app, name="nodes", rich_help_panel="Use")
    app.add_typer(node_bootstrap.app, name="node", rich_help_panel="Use")
    app.add_typer(models.app, name="models", rich_help_panel="Use")
    app.command("loras", rich_help_panel="Use")(models.loras)
    app.add_typer(services.app, name="services", rich_help_panel="Use")
    app.command("deploy", rich_help_panel="Use")(containers.deploy)
    app.command("containers", rich_help_panel="Use")(containers.containers)
    app.command("rm", rich_help_panel="Use")(containers.remove)
    app.command("logs", rich_help_panel="Use")(containers.logs)
    app.command("exec", rich_help_panel="Use", context_settings=shell.PASS_ON)(shell.execute)
    app.command("images", rich_help_panel="Use")(services.images)
    app.command("gallery", rich_help_panel="Use")(pictures.gallery)
    app.add_typer(outputs.app, name="outputs", rich_help_panel="Use")
    app.add_typer(outputs.inputs, name="input", rich_help_panel="Use")
    app.command("download", rich_help_panel="Use")(pictures.download)
    app.command("events", rich_help_panel="Use")(events.events)
    app.command("version", rich_help_panel="Use")(fleet.version)
    ours = {command.name for command in app.registered_commands} | {group.name for group in app.registered_groups}
    brought = sorted(metadata.entry_points(group=COMMANDS_GROUP), key=lambda entry: entry.name)
    alone = wanted in {*ours, *(entry.name for entry in brought)}
    if alone:
        # Of each command that the application has, the runner reads all annotations at each start.
        app.registered_commands = [command for command in app.registered_commands if command.name == wanted]
        app.registered_groups = [group for group in app.registered_groups if group.name == wanted]
    for entry in brought:
        if not alone or wanted == entry.name:
            app.command(entry.name, rich_help_panel="Run")(_load(entry))
    return app


def _version(asked: bool) -> None:
    if asked:
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
