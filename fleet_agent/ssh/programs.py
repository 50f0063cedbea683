"""Programs on a node that is reached by SSH: what an agent's own would say of them, word for word."""

from __future__ import annotations

import asyncio
import contextlib
import shlex
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

import asyncssh
from fleet.v1 import fleet_pb2, types_pb2

from fleet_agent.shell.commands import ShellCommands
from fleet_agent.shell.program import CHUNK_BYTES, MARK, NoProgramError, Program, check_env, words_of
from fleet_agent.ssh.link import SshLink

_FIND = """
case $1 in
  */*) test -e "$1" ;;
  *) IFS=:; for folder in $PATH; do test -f "$folder/$1" && test -x "$folder/$1" && exit 0; done; exit 1 ;;
esac
"""
"""The shell's own words for a missing program differ from machine to machine: it is looked for first. (`command -v`
would find what is built into the shell.)"""
_RUN = 'cd "$HOME" 2>/dev/null; echo "$$"; exec env "$@"'
"""Says its process id first: it leads a session, and so everything that it starts can be ended with it."""


class SshShell(ShellCommands):
    """Programs run as the SSH user; those in containers go through the node's Docker engine as everywhere."""

    link: SshLink | None = None

    async def _start(self, request: fleet_pb2.ExecRequest | fleet_pb2.ExecStart, command_id: str) -> Program:
        if request.HasField("container_name"):
            return await super()._start(request, command_id)
        words = words_of(request.command, shell=request.shell)
        env = {MARK: command_id, **check_env(dict(request.env))}
        if self.link is None:
            raise NoProgramError(126, "the node's SSH connection is lost")
        if isinstance(request, fleet_pb2.ExecStart) and request.tty:
            return await start_over_ssh(self.link, words, env, rows=request.rows or 24, columns=request.columns or 80)
        return await start_over_ssh(self.link, words, env)


async def start_over_ssh(
    link: SshLink, words: Sequence[str], env: Mapping[str, str], *, rows: int = 0, columns: int = 0
) -> SshProgram:
    """With `rows` and `columns` on a terminal. Raises NoProgramError."""
    found = await link.connection.run(shlex.join(["sh", "-c", _FIND, "sh", words[0]]), check=False)
    if found.exit_status:
        raise NoProgramError(127, f"{words[0]}: No such file or directory")
    assigned = [f"{name}={value}" for name, value in env.items()]
    inner = shlex.join(["sh", "-c", _RUN, "sh", *assigned, *words])
    terminal: dict[str, Any] = {"term_type": "xterm-256color", "term_size": (columns, rows)} if rows else {}
    try:
        process = await link.connection.create_process(inner, encoding=None, **terminal)
    except asyncssh.Error as error:
        raise NoProgramError(126, f"{words[0]}: {error}") from None
    leader = (await process.stdout.readline()).strip()
    return SshProgram(link, process, leader.decode(errors="replace"))


class SshProgram:
    """See Program."""

    def __init__(self, link: SshLink, process: asyncssh.SSHClientProcess[bytes], leader: str) -> None:
        self._link = link
        self._process = process
        self._leader = leader

    async def output(self) -> AsyncGenerator[tuple[str, bytes], None]:
        """(stdout or stderr, bytes) to the end of both."""
        found: asyncio.Queue[tuple[str, bytes] | None] = asyncio.Queue(2)

        async def pump(name: str, stream: asyncssh.SSHReader[bytes]) -> None:
            while data := await stream.read(CHUNK_BYTES):
                await found.put((name, data))

        async def both() -> None:
            await asyncio.gather(pump("stdout", self._process.stdout), pump("stderr", self._process.stderr))
            await found.put(None)

        reading = asyncio.create_task(both())
        try:
            while (item := await found.get()) is not None:
                yield item
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def write(self, data: bytes) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionError, asyncssh.Error):
            self._process.stdin.write(data)
            await self._process.stdin.drain()

    async def close_input(self) -> None:
        with contextlib.suppress(OSError, asyncssh.Error):
            self._process.stdin.write_eof()

    async def resize(self, rows: int, columns: int) -> None:
        with contextlib.suppress(OSError, asyncssh.Error):
            self._process.change_terminal_size(columns, rows)

    async def wait(self) -> types_pb2.Exit:
        await self._process.wait_closed()
        signal = self._process.exit_signal
        if signal is not None:
            return types_pb2.Exit(exit_code=128, signal=f"SIG{signal[0]}")
        code = self._process.exit_status
        return types_pb2.Exit(exit_code=255 if code is None else code)

    async def kill(self) -> None:
        if self._leader.isdigit():
            with contextlib.suppress(asyncssh.Error, OSError):
                script = 'pkill -KILL -s "$1" 2>/dev/null; kill -KILL "-$1" "$1" 2>/dev/null; true'
                await self._link.connection.run(shlex.join(["sh", "-c", script, "sh", self._leader]), check=False)

    async def close(self) -> None:
        if self._process.exit_status is None and self._process.exit_signal is None:
            await self.kill()
        self._process.close()
        with contextlib.suppress(asyncssh.Error, TimeoutError):
            async with asyncio.timeout(5):
                await self._process.wait_closed()
