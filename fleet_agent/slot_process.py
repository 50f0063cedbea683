"""One slot as the agent sees it: its child process, started again whenever it ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import structlog

from fleet_agent import frames

_log = structlog.get_logger("fleet.agent.slot")
_BACKOFF_SECONDS = (0.1, 0.5, 2, 5, 15)
_DESCRIBE_SECONDS = 120.0


class SlotCrashedError(RuntimeError):
    """The child ended while it had a task; `str` says how."""


def _command(models: Path, data: Path, *more: str) -> list[str]:
    own = ["--models", str(models), "--data", str(data), "--parent", str(os.getpid())]
    return [sys.executable, "-m", "fleet_agent.slot", *own, *more]


async def describe_engines(models: Path, data: Path, wanted: tuple[str, ...]) -> dict[str, Any]:
    """What engines there are, asked of a child process: a plug-in is never imported into the agent itself."""
    more = [word for name in wanted for word in ("--engine", name)]
    process = await asyncio.create_subprocess_exec(
        *_command(models, data, "--describe", *more),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(_DESCRIBE_SECONDS):
            frame = await frames.receive(process.stdout)
            await process.wait()
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        raise
    if frame is None:
        raise SlotCrashedError(f"the engines could not be listed: exit code {process.returncode}")
    return frame[0]


class SlotProcess:
    """Runs one task at a time in its child. `run` and `cancel` may be called from any task of the loop."""

    def __init__(self, index: int, models: Path, data: Path) -> None:
        self._index = index
        self._command = _command(models, data)
        self._process: asyncio.subprocess.Process | None = None
        self._crashes = 0
        self.loaded: list[dict[str, Any]] = []

    @property
    def pid(self) -> int | None:
        """The child's process id, None while there is none."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    async def start(self) -> None:
        """Starts the child where there is none, after a pause that grows with crashes in a row."""
        if self.pid is not None:
            return
        if self._crashes:
            await asyncio.sleep(_BACKOFF_SECONDS[min(self._crashes, len(_BACKOFF_SECONDS)) - 1])
        self.loaded = []
        process = await asyncio.create_subprocess_exec(
            *self._command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=frames.MAX_JSON_BYTES
        )
        self._process = process
        assert process.stdout is not None
        frame = await frames.receive(process.stdout)
        if frame is None:
            self._crashes += 1
            raise SlotCrashedError(f"the engine's process could not be started: {await self._ending()}")

    async def run(self, message: frames.Message) -> AsyncIterator[tuple[frames.Message, bytes]]:
        """Sends a task and yields its frames up to the last one. Raises SlotCrashedError where the child ends first."""
        await self.start()
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        process.stdin.write(frames.encode({"do": "run", **message}))
        token = message["token"]
        while (frame := await frames.receive(process.stdout)) is not None:
            event = frame[0]
            if event.get("token") != token:
                continue
            if "loaded" in event:
                self.loaded = event["loaded"]
                self._crashes = 0
            yield frame
            if event["event"] in ("done", "failed", "cancelled"):
                return
        self._crashes += 1
        raise SlotCrashedError(await self._ending())

    def cancel(self, token: str) -> None:
        """Tells the child to stop a task at its next step."""
        process = self._process
        if process is not None and process.stdin is not None and not process.stdin.is_closing():
            process.stdin.write(frames.encode({"do": "cancel", "token": token}))

    def kill(self) -> None:
        """Ends the child at once."""
        process = self._process
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()

    async def close(self) -> None:
        """Ends the child and waits for it."""
        self.kill()
        if self._process is not None:
            await self._ending()

    async def _ending(self) -> str:
        process = self._process
        assert process is not None
        code = await process.wait()
        if process.stdin is not None:
            process.stdin.close()
        self.loaded = []
        how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        _log.warning("the engine's process has ended", slot=self._index, how=how)
        return f"the engine's process {how}"
