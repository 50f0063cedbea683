"""`fleet status` and `version`."""

from __future__ import annotations

from importlib import metadata

from rich.text import Text

from fleet_client.cli.console import (
    JsonOption,
    KeyOption,
    UrlOption,
    errors_told,
    print_fields,
    print_json,
    say,
    write,
)
from fleet_client.cli.words import plain, seconds, state
from fleet_client.client import FleetCommander


def status(as_json: JsonOption = False, url: UrlOption = None, api_key: KeyOption = None) -> None:
    """How the fleet is."""
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        reply = fleet.status()
    if as_json:
        print_json(reply)
        return
    server = (
        Text().append(state(reply["status"])).append(f", version {plain(reply['version'])}, {plain(reply['mode'])}")
    )
    server.append(f", up for {seconds(reply['uptime_seconds'])}")
    print_fields(
        [
            ("server", server),
            ("nodes", _counts(reply["nodes"], ("online", "disconnected", "down"))),
            ("jobs", _counts(reply["jobs"], ("queued", "running", "succeeded", "failed", "cancelled"))),
            ("store", _part(reply["store"], f"durability {reply['durability']}")),
            ("s3", _part(reply["s3"])),
        ]
    )
    for notice in reply["notices"]:
        say(f"note: {notice}", "yellow")


def _counts(counts: dict[str, int], words: tuple[str, ...]) -> Text:
    """`2 online, 1 down`; noughts are dim."""
    parts = [Text(f"{counts[word]} {word}", style="" if counts[word] else "bright_black") for word in words]
    return Text(", ").join(parts)


def _part(part: dict[str, str | None], more: str = "") -> Text:
    told = ", ".join(plain(text) for text in (more, part["detail"]) if text)
    return Text().append(state(part["status"] or "")).append(f", {told}" if told else "")


def installed() -> str:
    """The version of this package."""
    return metadata.version("fleet-commander")


def version(as_json: JsonOption = False) -> None:
    """Print the version of this command; `fleet status` has the server's."""
    if as_json:
        print_json({"version": installed()})
    else:
        write(f"{installed()}\n")
