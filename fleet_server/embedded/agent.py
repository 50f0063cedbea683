"""The agent that `fleet up` runs beside the server: a child process, started again whenever it ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Mapping

import structlog

_log = structlog.get_logger("fleet.embedded")
_BACKOFF_SECONDS = (0.1, 0.5, 2.0, 5.0, 15.0)
_STABLE_SECONDS = 30.0


class EmbeddedAgent:
    """`run` keeps the agent alive until cancelled, then stops it. Start it from the main thread's loop."""

    def __init__(
        self, environment: Mapping[str, str], *, lock_fd: int, stop_seconds: float, module: str = "fleet_agent"
    ) -> None:
        # Keys of S3 are the server's alone: what an agent needs of it comes through the server.
        kept = {name: value for name, value in os.environ.items() if not name.startswith("FLEET_S3_")}
        self._environment = {**kept, **environment, "FLEET_AGENT_PARENT": str(os.getpid())}
        self._module = module
        self._lock_fd = lock_fd
        self._stop_seconds = stop_seconds
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        """The agent's process id, None while there is none."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    async def run(self) -> None:
        """Starts it again after every end, more slowly after ends in a row."""
        loop = asyncio.get_running_loop()
        quick_ends = 0
        try:
            while True:
                begun = loop.time()
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    self._module,
                    stdin=asyncio.subprocess.DEVNULL,
                    pass_fds=(self._lock_fd,),
                    env=self._environment,
                )
                code = await self._process.wait()
                quick_ends = 0 if loop.time() - begun > _STABLE_SECONDS else quick_ends + 1
                pause = _BACKOFF_SECONDS[min(quick_ends, len(_BACKOFF_SECONDS) - 1)]
                _log.warning("the agent has ended and is started again", code=code, in_seconds=pause)
                await asyncio.sleep(pause)
        finally:
            await asyncio.shield(self._stop())

    async def _stop(self) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(self._stop_seconds):
                await process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
