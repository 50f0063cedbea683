"""The steward of one node without an agent: to the server an agent as all others, of no slots, whose hands are SSH.

Commands, their journal, containers, logs and heartbeats are the agent's own code over a forwarded Docker socket, so
what callers see does not depend on how a node is reached. While SSH is lost the node is offline.
"""

from __future__ import annotations

import asyncio
import contextlib
import platform
import signal
from pathlib import Path

import structlog
from fleet.v1 import node_pb2
from pydantic_settings import BaseSettings, SettingsConfigDict

from fleet_agent.agent import FolderError
from fleet_agent.commands import CommandDesk
from fleet_agent.commands.journal import CommandJournal
from fleet_agent.docker_room import DockerRoom
from fleet_agent.enrol import enrolled
from fleet_agent.identity import Door
from fleet_agent.inventory import Inventory
from fleet_agent.runner import Runner
from fleet_agent.session import Session
from fleet_agent.settings import AgentSettings
from fleet_agent.spool import Spool
from fleet_agent.ssh.link import DOCKER, Address, LinkError, SshLink, linked
from fleet_agent.ssh.mounts import SshMounts
from fleet_agent.ssh.programs import SshShell
from fleet_agent.ssh.readings import SshReadings

_log = structlog.get_logger("fleet.agent.ssh")
_AGAIN_SECONDS, _LONGEST_SECONDS = 1.0, 30.0
_ABOUT = "uname -n; uname -m; uname -s"


class SshSettings(BaseSettings):
    """Where the node is, from FLEET_SSH_* variables."""

    model_config = SettingsConfigDict(env_prefix="FLEET_SSH_", extra="ignore")

    host: str
    port: int = 22
    user: str
    host_key: str
    identity: Path

    @property
    def address(self) -> Address:
        return Address(self.host, self.port, self.user, self.host_key, self.identity)


class StewardSession(Session):
    """Describes the node and not this machine."""

    about: tuple[str, str, str] = ("", "", "")

    async def _hello(self) -> node_pb2.Hello:
        hello = await super()._hello()
        hello.hostname, hello.arch, hello.os = self.about
        return hello


class NoFiles(Inventory):
    """It runs no jobs: no engines, no models."""

    async def load(self) -> None:
        """Nothing is looked for."""

    async def watch(self) -> None:
        """Nothing changes."""
        await asyncio.Event().wait()


async def run_steward(settings: AgentSettings, address: Address) -> None:
    """Until SIGTERM or SIGINT: reaches the node, serves it while it is there, and reaches it again."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    settings, door = await enrolled(settings)
    # No job fits a node without slots.
    settings = settings.model_copy(update={"slots": 0, "engines": ()})
    socket = settings.data_dir / "docker.sock"
    desk = CommandDesk(CommandJournal(settings.data_dir / "commands.db"))
    try:
        await asyncio.to_thread(settings.data_dir.mkdir, 0o700, True, True)
        unfinished = await desk.open()
    except OSError as error:
        raise FolderError(f"{error}: mend the file, or remove it") from error
    pause = _AGAIN_SECONDS
    try:
        while not stopping.is_set():
            try:
                async with linked(address, socket) as link:
                    pause = _AGAIN_SECONDS
                    await _serve(settings, door, desk, link, address, socket, stopping, unfinished)
                    unfinished = []
            except LinkError as error:
                _log.warning("the node is not reached", node_id=settings.node_id, why=str(error))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await stopping.wait()
            pause = min(2 * pause, _LONGEST_SECONDS)
    finally:
        await desk.aclose()


async def _serve(
    settings: AgentSettings,
    door: Door,
    desk: CommandDesk,
    link: SshLink,
    address: Address,
    socket: Path,
    stopping: asyncio.Event,
    unfinished: list[str],
) -> None:
    """One connection: an agent's life, which ends with it."""
    said = (await link.ask(_ABOUT)).splitlines()
    if len(said) != 3:
        raise LinkError(f"the host's shell says more than it was asked, or less: {said[:3]}")
    name, arch, system = said
    loop = asyncio.get_running_loop()
    settings = settings.model_copy(update={"docker_host": f"unix://{socket}"})
    place = f"behind {DOCKER} of {address.user}@{address.host}"
    docker = DockerRoom(settings, desk, SshMounts(settings.mount_roots, link, loop), place)
    shell = SshShell(settings.node_id, docker.engine)
    shell.link = link
    shell.register(desk)
    inventory = NoFiles(settings)
    runner = Runner(settings, inventory, await asyncio.to_thread(Spool, settings.data_dir / "spool"))
    readings = SshReadings(link, settings.metrics_seconds + 5)
    session = StewardSession(settings, inventory, runner, readings, desk, lambda: docker.facts, docker.welcomed, door)
    session.about = (name.strip(), arch.strip() or platform.machine(), system.strip().lower())
    docker.report_by(session.say)
    try:
        async with asyncio.TaskGroup() as tasks:
            await docker.open(unfinished)
            await runner.open(tasks)
            endless = [tasks.create_task(session.run()), tasks.create_task(docker.run())]
            lost = asyncio.ensure_future(link.ended())
            told = asyncio.ensure_future(stopping.wait())
            try:
                await asyncio.wait({lost, told}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                lost.cancel()
                told.cancel()
            if not stopping.is_set():
                _log.warning("the SSH connection is lost", node_id=settings.node_id)
            await session.goodbye()
            for task in endless:
                task.cancel()
            runner.cancel_tasks()
    finally:
        shell.link = None
        await docker.close()
        await runner.close()
