"""A program on a node that this terminal is connected to, over the server's WebSocket."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import shutil
import signal
import sys
import termios
import tty
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import websockets
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidStatus

from fleet_client import calls
from fleet_client.calls import Json, segment
from fleet_client.errors import ConnectionFailedError, FleetError, error_of_event

INPUT_BYTES = 16 << 10
_OPEN_SECONDS = 20.0


def _size() -> os.terminal_size:
    """The terminal's own size: COLUMNS and LINES, which count elsewhere, do not follow a change of it."""
    for stream in (sys.stdout, sys.stdin, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            return os.get_terminal_size(stream.fileno())
    return shutil.get_terminal_size()


@dataclass(frozen=True, slots=True)
class Program:
    """What to run, and how: `tty` on a terminal of its own, `stdin` with this process's input."""

    node_id: str
    command: str
    container_name: str | None = None
    shell: bool = False
    tty: bool = False
    stdin: bool = False
    env: dict[str, str] = field(default_factory=dict)

    def start(self) -> Json:
        """The first frame."""
        size = _size()
        terminal = {"tty": True, "rows": size.lines, "columns": size.columns} if self.tty else {}
        fields = {"command": self.command, "shell": self.shell, "container_name": self.container_name, "env": self.env}
        return {"start": {**calls.given(fields), **terminal}}


def run(url: str | None, api_key: str | None, program: Program) -> int:
    """Connects standard input, output and error to the program until it ends; its exit code.

    Raises FleetError: ApiError where the server refuses, ConnectionFailedError where it cannot be reached or is lost.
    """
    return asyncio.run(_run(calls.base_url(url), calls.headers(api_key), program))


async def _run(base: str, headers: Json, program: Program) -> int:
    address = f"ws{base.removeprefix('http')}/api/fleet/exec/{segment(program.node_id)}/stream"
    try:
        async with connect(
            address, additional_headers=headers, max_size=None, open_timeout=_OPEN_SECONDS, proxy=None
        ) as socket:
            await socket.send(json.dumps(program.start()))
            return await _connected(socket, program)
    except InvalidStatus as error:
        raise _refusal(error) from None
    except (OSError, TimeoutError, websockets.WebSocketException) as error:
        raise ConnectionFailedError(f"{base} cannot be reached: {error}") from error


async def _connected(socket: ClientConnection, program: Program) -> int:
    with _raw(program.tty and sys.stdin.isatty()):
        tasks = [asyncio.create_task(_typed(socket, program))]
        if program.tty:
            tasks.append(asyncio.create_task(_resized(socket)))
        try:
            return await _printed(socket)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _printed(socket: ClientConnection) -> int:
    async for text in socket:
        frame: Json = json.loads(text)
        for name, stream in (("stdout", sys.stdout), ("stderr", sys.stderr)):
            if frame.get(name) is not None:
                # A slow reader of ours holds the program back, not this loop.
                await asyncio.to_thread(_write, stream.buffer, base64.b64decode(frame[name]))
        if frame.get("exit") is not None:
            return int(frame["exit"]["exit_code"])
        if "detail" in frame:
            raise error_of_event(frame)
    raise ConnectionFailedError("the connection was lost before the program ended")


def _write(stream: Any, data: bytes) -> None:
    stream.write(data)
    stream.flush()


async def _typed(socket: ClientConnection, program: Program) -> None:
    """Standard input, to its end, to the program."""
    if program.stdin:
        loop = asyncio.get_running_loop()
        descriptor = sys.stdin.fileno()
        while data := await _input(loop, descriptor):
            await socket.send(json.dumps({"stdin": base64.b64encode(data).decode()}))
    elif program.tty:
        return
    await socket.send(json.dumps({"close_stdin": {}}))


async def _input(loop: asyncio.AbstractEventLoop, descriptor: int) -> bytes:
    ready = asyncio.Event()
    try:
        loop.add_reader(descriptor, ready.set)
    except PermissionError:
        # A plain file, which is always ready.
        return await asyncio.to_thread(os.read, descriptor, INPUT_BYTES)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(descriptor)
    return os.read(descriptor, INPUT_BYTES)


async def _resized(socket: ClientConnection) -> None:
    """The size of this terminal, whenever it changes."""
    changed = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGWINCH, changed.set)
    try:
        while True:
            await changed.wait()
            changed.clear()
            size = _size()
            await socket.send(json.dumps({"resize": {"rows": size.lines, "columns": size.columns}}))
    finally:
        loop.remove_signal_handler(signal.SIGWINCH)


@contextlib.contextmanager
def _raw(wanted: bool) -> Iterator[None]:
    """This terminal passes every key on, Ctrl-C too, while the block runs."""
    if not wanted:
        yield
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    try:
        # What was typed ahead is kept.
        tty.setraw(descriptor, termios.TCSADRAIN)
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _refusal(error: InvalidStatus) -> FleetError:
    body = error.response.body or b""
    try:
        said: Json = json.loads(body)
    except ValueError:
        said = {"detail": f"the server answers with status {error.response.status_code}"}
    return error_of_event({"status": error.response.status_code, **said})
