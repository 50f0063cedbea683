"""Programs on a node that is reached by SSH: what an agent's own would say of them, word for word."""

from __future__ import annotations

import asyncio
import contextlib
import shlex
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any

import asyncssh
from fleet.v1 import fleet_pb2, types_pb2

from fleet_agent.commands.faults import CommandFault, unknown
from fleet_agent.shell.commands import ShellCommands
from fleet_agent.shell.program import CHUNK_BYTES, MARK, NoProgramError, Program, check_env, words_of
from fleet_agent.ssh.link import LinkError, Process, SshLink

_RUN = """
word=$1; shift
cd "$HOME" 2>/dev/null
case $word in
  */*) test -e "$word" ;;
  *) (IFS=:; for folder in $PATH; do test -f "$folder/$word" && test -x "$folder/$word" && exit 0; done; exit 1) ;;
esac || { echo missing; exit 127; }
(read -r stat <"/proc/$$/stat"; set -- ${stat##*) }; echo "$4")
exec env "$@"
"""
"""The shell's own words for a missing program differ from machine to machine: it is looked for first. (`command -v`
would find what is built into the shell.) Then it says which session it is in: all that it starts is in there too."""
_KILL = 'pkill -KILL -s "$1" 2>/dev/null; kill -KILL "-$1" "$1" 2>/dev/null; true'
_KILL_MARKED = """
killed=0
for again in 1 2 3 4 5 6 7 8 9; do
  found=0
  for file in $(grep -lsF -- "$1" /proc/[0-9]*/cgroup); do
    folder=${file%/cgroup}
    if tr "\\0" "\\n" <"$folder/environ" 2>/dev/null | grep -qxF -- "$2"; then
      kill -KILL "${folder#/proc/}" 2>/dev/null && found=1 killed=$((killed + 1))
    fi
  done
  test "$found" = 0 && break
done
echo "$killed"
"""
"""As shell.processes.kill_all does it here: what is being started meanwhile is found by looking again."""


class SshShell(ShellCommands):
    """Programs run as the SSH user; those in containers go through the node's Docker engine as everywhere."""

    link: SshLink | None = None

    async def _start(self, request: fleet_pb2.ExecRequest | fleet_pb2.ExecStart, command_id: str) -> Program:
        if request.HasField("container_name"):
            return await super()._start(request, command_id)
        words = words_of(request.command, shell=request.shell)
        env = {MARK: command_id, **check_env(dict(request.env))}
        if self.link is None:
            raise CommandFault("NODE_OFFLINE", "the node's SSH connection is lost: try again")
        if isinstance(request, fleet_pb2.ExecStart) and request.tty:
            return await start_over_ssh(self.link, words, env, rows=request.rows or 24, columns=request.columns or 80)
        return await start_over_ssh(self.link, words, env)

    async def _kill_marked(self, mark: str, container_id: str) -> int:
        if self.link is None:
            return 0
        try:
            return int(await self.link.ask(_KILL_MARKED, container_id, mark))
        except (LinkError, ValueError):
            return 0


async def start_over_ssh(
    link: SshLink, words: Sequence[str], env: Mapping[str, str], *, rows: int = 0, columns: int = 0
) -> SshProgram:
    """With `rows` and `columns` on a terminal. Raises NoProgramError, CommandFault NODE_OFFLINE."""
    assigned = [f"{name}={value}" for name, value in env.items()]
    inner = shlex.join(["sh", "-c", _RUN, "sh", words[0], *assigned, *words])
    terminal: dict[str, Any] = {"term_type": "xterm-256color", "term_size": (columns, rows)} if rows else {}
    try:
        process, left = await link.start(inner, **terminal)
    except (asyncssh.Error, LinkError, OSError) as error:
        raise CommandFault("NODE_OFFLINE", f"the node is not reached by SSH: {error}: try again") from None
    program = SshProgram(link, process, left)
    try:
        program.session = (await process.stdout.readline()).strip().decode(errors="replace")
    except BaseException:
        await program.close()
        raise
    if program.session == "missing":
        await program.close()
        raise NoProgramError(127, f"{words[0]}: No such file or directory")
    return program


class SshProgram:
    """See Program."""

    def __init__(self, link: SshLink, process: Process, left: Callable[[], None]) -> None:
        self.session = ""
        self._link = link
        self._process = process
        self._left = left

    async def output(self) -> AsyncGenerator[tuple[str, bytes], None]:
        """(stdout or stderr, bytes) to the end of both."""
        found: asyncio.Queue[tuple[str, bytes] | None] = asyncio.Queue(2)

        async def pump(name: str, stream: asyncssh.SSHReader[bytes]) -> None:
            # Of a connection that was lost `wait` tells.
            with contextlib.suppress(asyncssh.Error, OSError):
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
        if code is None:
            raise unknown("the node's SSH connection was lost while the program ran")
        return types_pb2.Exit(exit_code=code)

    async def kill(self) -> None:
        if self.session.isdigit():
            with contextlib.suppress(asyncssh.Error, LinkError, OSError):
                await self._link.run(_KILL, self.session)

    async def close(self) -> None:
        if self._process.exit_status is None and self._process.exit_signal is None:
            await self.kill()
        self._process.close()
        try:
            with contextlib.suppress(asyncssh.Error, TimeoutError):
                async with asyncio.timeout(5):
                    await self._process.wait_closed()
        finally:
            self._left()
