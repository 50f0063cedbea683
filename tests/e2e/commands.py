"""The command `fleet` as a person runs it: a process of its own, with or without a terminal."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from fleet_client.cli.app import build
from typer.testing import CliRunner, Result

from tests.e2e.fleet_process import clean_environment

SECONDS = 120.0


def fleet_command(*words: str, url: str, given: bytes | None = None) -> Result:
    """Runs `fleet …` to its end, in this process: a new one for each call would cost a test more than the call. Of the
    command line it has what that command needs, as the real one."""
    return CliRunner().invoke(
        build(words[0] if words else None), words, input=given, env={"FLEET_URL": url}, catch_exceptions=False
    )


def fleet_process(
    *words: str, url: str, shell: str = "{}", more: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Starts `fleet …` as a process, without a terminal; `shell` may put it into a line of bash."""
    command = shlex.join([sys.executable, "-m", "fleet_client", *words])
    return subprocess.Popen(
        ["bash", "-c", shell.format(f"exec {command}" if shell == "{}" else command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=clean_environment({"FLEET_URL": url, **(more or {})}),
    )


# A session of its own and its terminal, so that a typed Ctrl-C reaches it.
_TAKE_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
)


class Terminal:
    """`fleet …` in a terminal of 120 columns and 40 rows that shows 24-bit colour."""

    def __init__(self, *words: str, url: str, folder: Path, more: Mapping[str, str] | None = None) -> None:
        self._words = words
        self._folder = folder
        settings = {"FLEET_URL": url, "TERM": "xterm-256color", "COLORTERM": "truecolor", "COLUMNS": "120"}
        self._environment = clean_environment({**settings, "LINES": "40", **(more or {})})
        self.shown = ""

    def __enter__(self) -> Self:
        self._master, slave = pty.openpty()
        command = [sys.executable, "-m", "fleet_client", *self._words]
        self.process = subprocess.Popen(
            [sys.executable, "-c", _TAKE_TERMINAL, *command],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=self._folder,
            env=self._environment,
            start_new_session=True,
        )
        os.close(slave)
        return self

    def read_until(self, condition: Callable[[str], object]) -> str:
        """What was shown, once the condition holds for it."""
        until = time.monotonic() + SECONDS
        while not condition(self.shown):
            left = until - time.monotonic()
            assert left > 0, f"never shown: {self.shown[-2000:]!r}"
            if not self._read(left):
                break
        assert condition(self.shown), self.shown[-2000:]
        return self.shown

    def press(self, keys: bytes) -> None:
        """Keys of the person."""
        os.write(self._master, keys)

    def end(self) -> int:
        """Reads on to the end of the command; its exit code."""
        while self._read(SECONDS):
            pass
        return self.process.wait(SECONDS)

    def _read(self, seconds: float) -> bool:
        if not select.select([self._master], [], [], seconds)[0]:
            return False
        # A terminal whose last user has gone gives EIO.
        with contextlib.suppress(OSError):
            data = os.read(self._master, 65_536)
            self.shown += data.decode(errors="replace")
            return bool(data)
        return False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._master)
