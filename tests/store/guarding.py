"""Takes one guard out of the scripts and plays a story with what is left."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from fleet_server.store import Store
from fleet_server.store.lua import Script, build, load_scripts, read_sources
from tests.store.audit import audit, clear
from tests.store.conftest import Server
from tests.store.making import ManualClock

Story = Callable[[Store, ManualClock], Awaitable[None]]


@dataclass(frozen=True)
class Guard:
    """Text of a script (or of "lib/...") and what takes the guard out of it."""

    place: str
    text: str
    without: str
    story: Story


def scripts_without(guard: Guard | None) -> dict[str, Script]:
    """All scripts, those that the guard was in without it."""
    scripts = dict(load_scripts())
    if guard is None:
        return scripts
    sources, lib = read_sources()
    shared = guard.place.startswith("lib/")
    texts, name = (lib, guard.place.removeprefix("lib/")) if shared else (sources, guard.place)
    assert guard.text in texts[name], f"{guard.place} has no {guard.text!r} any more"
    texts[name] = texts[name].replace(guard.text, guard.without, 1)
    changed = sources if shared else {name}
    return {**scripts, **{each: build(each, sources[each], lib) for each in changed}}


async def play(server: Server, namespace: str, story: Story, scripts: dict[str, Script]) -> None:
    clock = ManualClock()
    store = Store(server.url, namespace, clock, lambda row: b"row", scripts)
    try:
        async with asyncio.timeout(50):
            await story(store, clock)
    finally:
        await store.aclose()
    client = server.client()
    try:
        audit(client, namespace)
        clear(client, namespace)
    finally:
        client.close()
