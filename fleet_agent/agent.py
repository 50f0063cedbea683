"""An agent from start to end: folders, inventory, runner and session in one task group."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal

import structlog

from fleet_agent.inventory import Inventory
from fleet_agent.metrics.reader import MetricsReader
from fleet_agent.runner import Runner
from fleet_agent.session import Session
from fleet_agent.settings import AgentSettings
from fleet_agent.spool import Spool

_log = structlog.get_logger("fleet.agent")


class FolderInUseError(RuntimeError):
    """Another agent runs on this folder."""


async def run_agent(settings: AgentSettings) -> None:
    """Runs until SIGTERM or SIGINT; then gives its work back, says goodbye and returns.

    Raises FolderInUseError where another agent uses the folder: two would send each other's results.
    """
    lock = _lock(settings)
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    settings.models_folder.mkdir(parents=True, exist_ok=True)
    inventory = Inventory(settings)
    await inventory.load()
    spool = await asyncio.to_thread(Spool, settings.data_dir / "spool")
    runner = Runner(settings, inventory, spool)
    session = Session(settings, inventory, runner, MetricsReader(settings.data_dir))
    try:
        async with asyncio.TaskGroup() as tasks:
            await runner.open(tasks)
            endless = [tasks.create_task(session.run()), tasks.create_task(_hash(inventory))]
            await stopping.wait()
            _log.info("stopping")
            await runner.release()
            await session.goodbye()
            for task in endless:
                task.cancel()
            runner.cancel_tasks()
    finally:
        await runner.close()
        os.close(lock)


async def _hash(inventory: Inventory) -> None:
    """Hashes model files that are new, off the road of the work."""
    while True:
        await inventory.hash_files()
        await asyncio.sleep(30)


def _lock(settings: AgentSettings) -> int:
    settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(settings.data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise FolderInUseError(
            f"{settings.data_dir} is in use by another agent: stop it, or give another --data-dir"
        ) from None
    return fd
