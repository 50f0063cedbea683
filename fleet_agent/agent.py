"""An agent from start to end: folders, inventory, runner and session in one task group."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import structlog
import uvloop

from fleet_agent.commands import CommandDesk, CommandJournal
from fleet_agent.disk import lasting_folder
from fleet_agent.docker_room import DockerRoom
from fleet_agent.engine_requests import EngineRequests
from fleet_agent.enrol import enrolled, keep_fresh
from fleet_agent.identity import Door, IdentityError
from fleet_agent.inventory import Inventory
from fleet_agent.logs import configure
from fleet_agent.memory import settle_memory
from fleet_agent.metrics.reader import MetricsReader
from fleet_agent.model_room import ModelRoom
from fleet_agent.runner import Runner
from fleet_agent.session import Session
from fleet_agent.settings import AgentSettings
from fleet_agent.spool import Spool

_log = structlog.get_logger("fleet.agent")


class FolderError(RuntimeError):
    """The agent cannot use its folder."""


class FolderInUseError(FolderError):
    """Another agent runs on this folder."""


def main(settings: AgentSettings) -> int:
    """Runs an agent in this process; the exit code: 0 after a stop, 3 where its folder cannot be used, 4 where it has
    no identity that the server takes."""
    configure(settings.log_level)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(run_agent(settings, begun=settle_memory))
    except FolderError as error:
        sys.stderr.write(f"{error}\n")
        return 3
    except IdentityError as error:
        sys.stderr.write(f"{error}\n")
        return 4
    return 0


def enrol_only(settings: AgentSettings) -> int:
    """Joins, or finds that this machine has; the exit code as `main`'s."""
    configure(settings.log_level)
    try:
        asyncio.run(_enrol_only(settings))
    except FolderError as error:
        sys.stderr.write(f"{error}\n")
        return 3
    except IdentityError as error:
        sys.stderr.write(f"{error}\n")
        return 4
    return 0


async def _enrol_only(settings: AgentSettings) -> None:
    with _locked(settings.data_dir):
        await enrolled(settings)


async def run_agent(settings: AgentSettings, *, begun: Callable[[], None] = lambda: None) -> None:
    """Runs until SIGTERM or SIGINT; then gives its work back, says goodbye and returns. `begun` is called when all is
    wired.

    Raises IdentityError where it cannot join, FolderInUseError where another agent uses the folder (two would send each
    other's results), FolderError where it cannot be written to.
    """
    with _locked(settings.data_dir):
        stopping = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopping.set)
        settings, door = await enrolled(settings)
        spool = await asyncio.to_thread(_folders, settings)
        inventory = Inventory(settings)
        if await _unless(stopping, inventory.load()):
            await _serve(settings, inventory, spool, stopping, door, begun)


async def _serve(
    settings: AgentSettings,
    inventory: Inventory,
    spool: Spool,
    stopping: asyncio.Event,
    door: Door,
    begun: Callable[[], None],
) -> None:
    runner = Runner(settings, inventory, spool)
    metrics = MetricsReader(settings.data_dir, settings.metrics_seconds)
    desk = CommandDesk(CommandJournal(settings.data_dir / "commands.db"))
    docker = DockerRoom(settings, desk)
    session = Session(settings, inventory, runner, metrics, desk, lambda: docker.facts, docker.welcomed, door)
    docker.report_by(session.say)
    models = ModelRoom(settings, inventory, runner, session.beat)
    models.register(desk)
    requests = EngineRequests({"comfyui": settings.comfyui_url})
    requests.register(desk)
    try:
        try:
            unfinished = await desk.open()
        except OSError as error:
            raise FolderError(f"{error}: mend the file, or remove it") from error
        async with asyncio.TaskGroup() as tasks:
            await docker.open(unfinished)
            if await _unless(stopping, runner.open(tasks)):
                await models.open()
                begun()
                endless = [tasks.create_task(work) for work in (session.run(), inventory.watch(), models.run())]
                endless.append(tasks.create_task(docker.run()))
                endless.append(tasks.create_task(keep_fresh(settings, door)))
                await stopping.wait()
                _log.info("stopping")
                await runner.release()
                await session.goodbye()
                for task in endless:
                    task.cancel()
            runner.cancel_tasks()
    finally:
        await desk.aclose()
        await requests.aclose()
        await docker.close()
        await models.aclose()
        await runner.close()


async def _unless(stopping: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
    """Does the work to its end; false, with the work cancelled, where the agent is to stop first."""
    stop, task = asyncio.ensure_future(stopping.wait()), asyncio.ensure_future(work)
    try:
        await asyncio.wait({stop, task}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            return False
        task.result()
        return True
    finally:
        stop.cancel()
        task.cancel()
        await asyncio.gather(stop, task, return_exceptions=True)


def _folders(settings: AgentSettings) -> Spool:
    try:
        lasting_folder(settings.models_folder)
    except OSError as error:
        _log.warning("there is no model folder", folder=str(settings.models_folder), error=error.strerror)
    try:
        return Spool(settings.data_dir / "spool")
    except OSError as error:
        raise FolderError(_cannot(settings.data_dir, error)) from error


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the folder's lock, with our pid in it."""
    try:
        lasting_folder(folder, 0o700)
        fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise FolderError(_cannot(folder, error)) from error
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.pread(fd, 20, 0).decode(errors="replace").strip() or "unknown"
            raise FolderInUseError(
                f"{folder} is in use by another agent (pid {pid}): stop it, or give another --data-dir"
            ) from None
        with contextlib.suppress(OSError):
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(fd)


def _cannot(folder: Path, error: OSError) -> str:
    return f"{folder}: {error.strerror}: give a folder that the agent may write to with --data-dir"
