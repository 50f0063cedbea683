"""A child process of ours: it dies with us, holds our locks, and is started again with backoff whenever it ends.

`start` and every restart must happen in the process's main thread: the kernel ties PDEATHSIG to the thread that
forks. The child is not given a `preexec_fn`, which is not safe beside threads: a short Python launcher sets PDEATHSIG
and becomes the program.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

READY_SECONDS = 120.0
STOP_SECONDS = 10.0
FIRST_BACKOFF_SECONDS = 0.1
LAST_BACKOFF_SECONDS = 5.0
STABLE_SECONDS = 30.0
_LAST_LINES = 5

_LAUNCHER = """
import ctypes, os, signal, sys
parent = int(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
if libc.prctl(1, signal.SIGTERM, 0, 0, 0) != 0:
    sys.exit("prctl failed: %d" % ctypes.get_errno())
if os.getppid() != parent:
    sys.exit("the parent is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""

log = logging.getLogger(__name__)


def _nothing() -> None:
    """For hooks that are not needed."""


@dataclass(frozen=True, slots=True)
class Program:
    """What is run, and how we know that it is well.

    `answers` is asked again and again until it is true. `before` runs before each start, `after` when the program has
    answered. `log` is where its last words are read; standard error goes there too where `log_stderr`.
    """

    name: str
    command: Sequence[str | Path]
    answers: Callable[[], Awaitable[bool]]
    log: Path
    log_stderr: bool = False
    pass_fds: Sequence[int] = ()
    environment: Mapping[str, str] | None = None
    before: Callable[[], None] = _nothing
    after: Callable[[], None] = _nothing


class Child:
    """Runs one program until `stop`. Dead programs are started again with backoff, for ever."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._process: asyncio.subprocess.Process | None = None
        self._keeper: asyncio.Task[None] | None = None
        self.restarts = 0

    @property
    def pid(self) -> int | None:
        """The program's process id, None while it is down."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    async def start(self) -> None:
        """Starts the program and waits until it answers.

        Raises RuntimeError with the end of its log if it dies at once, TimeoutError after two minutes.
        """
        await self._spawn()
        try:
            await self._until_ready()
        except BaseException:
            await self._end()
            raise
        self._program.after()
        self._keeper = asyncio.create_task(self._keep(), name=f"keeper of {self._program.name}")

    async def launch(self) -> None:
        """Starts the program without waiting; where it ends at once it is started again like after any other end."""
        await self._spawn()
        self._keeper = asyncio.create_task(self._keep(), name=f"keeper of {self._program.name}")

    async def stop(self) -> None:
        """Ends the program in order; SIGKILL after ten seconds."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])
        await self._end()

    async def wait(self) -> None:
        """Returns when the program was stopped."""
        if self._keeper is not None:
            await asyncio.wait([self._keeper])

    async def _spawn(self) -> None:
        program = self._program
        program.before()
        with contextlib.suppress(FileNotFoundError):
            program.log.replace(program.log.with_suffix(".log.1"))
        with contextlib.ExitStack() as stack:
            errors: int = asyncio.subprocess.DEVNULL
            if program.log_stderr:
                errors = stack.enter_context(program.log.open("ab")).fileno()
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-I",
                "-S",
                "-c",
                _LAUNCHER,
                str(os.getpid()),
                *(str(word) for word in program.command),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=errors,
                pass_fds=tuple(program.pass_fds),
                env=None if program.environment is None else dict(program.environment),
                start_new_session=True,
            )

    async def _until_ready(self) -> None:
        assert self._process is not None
        async with asyncio.timeout(READY_SECONDS):
            while True:
                if self._process.returncode is not None:
                    raise RuntimeError(
                        f"{self._program.name} ended at once ({self._process.returncode}): {self._last_words()}"
                    )
                if await self._program.answers():
                    return
                await asyncio.sleep(0.01)

    def _last_words(self) -> str:
        try:
            return " / ".join(self._program.log.read_text(errors="replace").splitlines()[-_LAST_LINES:])
        except OSError as error:
            return str(error)

    async def _keep(self) -> None:
        backoff = FIRST_BACKOFF_SECONDS
        loop = asyncio.get_running_loop()
        while True:
            assert self._process is not None
            began = loop.time()
            code = await self._process.wait()
            if loop.time() - began > STABLE_SECONDS:
                backoff = FIRST_BACKOFF_SECONDS
            log.error("%s died (%s): %s", self._program.name, code, self._last_words())
            await asyncio.sleep(backoff * random.uniform(0.5, 1.0))
            backoff = min(backoff * 2, LAST_BACKOFF_SECONDS)
            try:
                await self._spawn()
                self.restarts += 1
                await self._until_ready()
                self._program.after()
            except (RuntimeError, TimeoutError, OSError) as error:
                log.error("%s does not start: %s", self._program.name, error)
                if self.pid is not None:
                    await self._end()

    async def _end(self) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
