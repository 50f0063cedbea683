"""Which engines there are, asked of a child process: a plug-in is never imported into the agent itself."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import structlog

from fleet_agent import frames
from fleet_agent.engine_options import NO_OPTIONS
from fleet_agent.engines import registry
from fleet_agent.slot_process import kill_group, spawn_child

_log = structlog.get_logger("fleet.agent.engines")


class DescribeError(RuntimeError):
    """The child ended, or fell silent, before it had named its engines."""


async def describe_engines(
    models: Path, data: Path, wanted: Sequence[str], seconds: float, options: Mapping[str, str] = NO_OPTIONS
) -> dict[str, Any]:
    """The engines named, all but the special ones where none is: {"statuses": [...], "infos": {name: ...}}.

    Where an engine takes the child with it, each is asked alone, and that one is reported as failed.
    """
    try:
        return await _ask(models, data, wanted, seconds, options)
    except DescribeError as error:
        _log.warning("the engines are asked one by one", why=str(error))
    names = wanted or [*registry.by_default(options), *(entry.name for entry in registry.installed())]
    found: dict[str, Any] = {"statuses": [], "infos": {}}
    for name in sorted(set(names)):
        try:
            one = await _ask(models, data, [name], seconds, options)
        except DescribeError as error:
            status = {"name": name, "version": "", "status": "failed", "detail": str(error), "job_types": []}
            one = {"statuses": [status], "infos": {}}
        found["statuses"] += one["statuses"]
        found["infos"] |= one["infos"]
    return found


async def _ask(
    models: Path, data: Path, wanted: Sequence[str], seconds: float, options: Mapping[str, str]
) -> dict[str, Any]:
    more = [word for name in wanted for word in ("--engine", name)]
    process = await spawn_child(models, data, "--describe", *more, stdin=asyncio.subprocess.DEVNULL, options=options)
    assert process.stdout is not None
    frame, why = None, ""
    try:
        async with asyncio.timeout(seconds):
            frame = await frames.receive(process.stdout)
    except TimeoutError:
        why = f"it said nothing for {seconds:g} s"
    except frames.BadFrameError as error:
        why = str(error)
    finally:
        if frame is None and not why:
            # It has ended, or is about to: then its exit code says more than our signal.
            await _wait_shortly(process)
        kill_group(process)
        await process.wait()
    if frame is None:
        raise DescribeError(f"the engines' process gave no answer: {why or f'exit code {process.returncode}'}")
    return frame[0]


async def _wait_shortly(process: asyncio.subprocess.Process) -> None:
    try:
        async with asyncio.timeout(2):
            await process.wait()
    except TimeoutError:
        return
