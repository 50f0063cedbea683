"""A program on this node, as the agent's user, in a session of its own."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import pty
import signal
import struct
import termios
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fleet.v1 import types_pb2

from fleet_agent.shell.processes import in_session, kill_all
from fleet_agent.shell.program import CHUNK_BYTES, MARK, NoProgramError

_HIDDEN = ("FLEET_",)
"""Variables of the agent that programs do not see: its key is among them."""
_LINGER_SECONDS = 0.5
"""What a program left running may hold its output open; so long it is read on after the program's end."""
# A session leader that opens a terminal gets it as its own.
_ON_TERMINAL = 'exec "$@" <>"$0" >&0 2>&1'


def node_env(command_id: str, more: Mapping[str, str]) -> dict[str, str]:
    """The agent's own variables less the fleet's, and those that were asked for."""
    own = {name: text for name, text in os.environ.items() if not name.startswith(_HIDDEN)}
    return {**own, MARK: command_id, **more}


async def start_on_node(
    words: Sequence[str],
    env: Mapping[str, str],
    *,
    stdin: bool = False,
    tty: bool = False,
    rows: int = 0,
    columns: int = 0,
) -> NodeProgram:
    """Raises NoProgramError."""
    master = slave = -1
    if tty:
        master, slave = pty.openpty()
        os.set_blocking(master, False)
        _set_size(master, rows or 24, columns or 80)
        words = ["/bin/sh", "-c", _ON_TERMINAL, os.ttyname(slave), *words]
        env = {"TERM": "xterm-256color", **env}
    pipe = asyncio.subprocess.DEVNULL if tty else asyncio.subprocess.PIPE
    try:
        process = await asyncio.create_subprocess_exec(
            *words,
            stdin=asyncio.subprocess.PIPE if stdin and not tty else asyncio.subprocess.DEVNULL,
            stdout=pipe,
            stderr=pipe,
            env=dict(env),
            cwd=_home(),
            start_new_session=True,
            limit=CHUNK_BYTES,
        )
    except OSError as error:
        for fd in (master, slave):
            if fd >= 0:
                os.close(fd)
        missing = error.errno in (errno.ENOENT, errno.ENOTDIR)
        raise NoProgramError(127 if missing else 126, f"{words[0]}: {error.strerror}") from None
    return NodeProgram(process, master, slave)


class NodeProgram:
    """See Program."""

    def __init__(self, process: asyncio.subprocess.Process, master: int, slave: int) -> None:
        self._process = process
        self._master = master
        self._slave = slave
        self._moves = 0

    async def output(self) -> AsyncGenerator[tuple[str, bytes], None]:
        """(stdout or stderr, bytes) to the end of both; on a terminal all is stdout."""
        if self._master >= 0:
            async for data in self._screen():
                yield "stdout", data
            return
        found: asyncio.Queue[tuple[str, bytes] | None] = asyncio.Queue(2)
        readers = [
            asyncio.create_task(_pump("stdout", self._process.stdout, found)),
            asyncio.create_task(_pump("stderr", self._process.stderr, found)),
        ]
        over = asyncio.create_task(self._lingered(readers, found))
        try:
            while (item := await found.get()) is not None:
                self._moves += 1
                yield item
        finally:
            for task in (over, *readers):
                task.cancel()
            await asyncio.gather(over, *readers, return_exceptions=True)

    async def _lingered(
        self, readers: list[asyncio.Task[None]], found: asyncio.Queue[tuple[str, bytes] | None]
    ) -> None:
        """Ends the output: with both pipes, or a moment after the program where others hold them and are silent."""
        ended = asyncio.ensure_future(self._process.wait())
        open_pipes = {*readers}
        while open_pipes and not ended.done():
            waiting: set[asyncio.Future[Any]] = {*open_pipes, ended}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            open_pipes = {one for one in open_pipes if not one.done()}
        silent = False
        while open_pipes and not silent:
            before = self._moves
            _, open_pipes = await asyncio.wait(open_pipes, timeout=_LINGER_SECONDS)
            # What waits for a slow reader is no silence.
            silent = found.empty() and self._moves == before
        ended.cancel()
        await found.put(None)

    async def _screen(self) -> AsyncGenerator[bytes, None]:
        ended = asyncio.create_task(self._process.wait())
        try:
            while True:
                try:
                    data = os.read(self._master, CHUNK_BYTES)
                except BlockingIOError:
                    if ended.done() and not await _ready(self._master, _LINGER_SECONDS / 5):
                        return
                    await _ready(self._master, None, ended)
                    continue
                except OSError:
                    return
                if not data:
                    return
                yield data
        finally:
            ended.cancel()

    async def write(self, data: bytes) -> None:
        if self._master >= 0:
            waiting = memoryview(data)
            while waiting and self._process.returncode is None:
                try:
                    waiting = waiting[os.write(self._master, waiting) :]
                except BlockingIOError:
                    await _ready(self._master, 0.5, write=True)
                except OSError:
                    return
        elif self._process.stdin is not None and not self._process.stdin.is_closing():
            with contextlib.suppress(ConnectionError, OSError):
                self._process.stdin.write(data)
                await self._process.stdin.drain()

    async def close_input(self) -> None:
        if self._master >= 0:
            # What Ctrl-D does.
            await self.write(b"\x04")
        elif self._process.stdin is not None:
            self._process.stdin.close()

    async def resize(self, rows: int, columns: int) -> None:
        if self._master >= 0:
            _set_size(self._master, rows, columns)

    async def wait(self) -> types_pb2.Exit:
        code = await self._process.wait()
        if code >= 0:
            return types_pb2.Exit(exit_code=code)
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"SIG{-code}"
        return types_pb2.Exit(exit_code=128 - code, signal=name)

    async def kill(self) -> None:
        # Whatever process groups a shell has made in it.
        leader = self._process.pid
        await asyncio.to_thread(kill_all, lambda pid: in_session(pid, leader))

    async def close(self) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGHUP)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LINGER_SECONDS):
                    await self._process.wait()
            await self.kill()
            await self._process.wait()
        for fd in (self._master, self._slave):
            if fd >= 0:
                os.close(fd)
        self._master = self._slave = -1
        transport = getattr(self._process, "_transport", None)
        if transport is not None:
            # Pipes that others still hold are not ours to wait for.
            transport.close()


async def _pump(name: str, stream: asyncio.StreamReader | None, found: asyncio.Queue[tuple[str, bytes] | None]) -> None:
    while stream is not None and (data := await stream.read(CHUNK_BYTES)):
        await found.put((name, data))


async def _ready(
    fd: int, seconds: float | None, also: asyncio.Future[int] | None = None, *, write: bool = False
) -> bool:
    """Whether the terminal can be read (or written) within that time; `also` ends the waiting too."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def set_ready() -> None:
        if not ready.done():
            ready.set_result(None)

    add, remove = (loop.add_writer, loop.remove_writer) if write else (loop.add_reader, loop.remove_reader)
    add(fd, set_ready)
    try:
        waiting: set[asyncio.Future[Any]] = {ready}
        if also is not None:
            waiting.add(also)
        await asyncio.wait(waiting, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        return ready.done()
    finally:
        remove(fd)


def _set_size(master: int, rows: int, columns: int) -> None:
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def _home() -> str:
    try:
        home = Path.home()
    except RuntimeError:
        return "/"
    return str(home) if home.is_dir() else "/"
