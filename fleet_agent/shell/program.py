"""A program that runs, wherever it does."""

from __future__ import annotations

import shlex
from collections.abc import AsyncGenerator
from typing import Protocol

from fleet.v1 import types_pb2

from fleet_agent.commands.faults import CommandFault

CHUNK_BYTES = 64 << 10
MARK = "FLEET_COMMAND_ID"
"""The variable by which a program, and all that it started, can be found."""


class NoProgramError(Exception):
    """It could not be started; `exit_code` is 127 where there is no such program, 126 where it cannot be run."""

    def __init__(self, exit_code: int, why: str) -> None:
        super().__init__(why)
        self.exit_code = exit_code


class Program(Protocol):
    """Output that is not taken holds the program back."""

    def output(self) -> AsyncGenerator[tuple[str, bytes], None]:
        """(stdout or stderr, bytes) to the end of both."""
        ...

    async def write(self, data: bytes) -> None:
        """Input; waits while the program takes none. What comes after its end is dropped."""
        ...

    async def close_input(self) -> None:
        """No more input."""
        ...

    async def resize(self, rows: int, columns: int) -> None:
        """The terminal has changed; without one nothing happens."""
        ...

    async def wait(self) -> types_pb2.Exit:
        """How it ended, once it has."""
        ...

    async def kill(self) -> None:
        """Ends it and what it started, at once."""
        ...

    async def close(self) -> None:
        """Gives back what it holds; kills it where it still runs."""
        ...


def words_of(command: str, *, shell: bool) -> list[str]:
    """The words of a command line. Raises CommandFault INVALID_FIELD."""
    if "\0" in command:
        raise CommandFault("INVALID_FIELD", "command: must not hold a NUL")
    if shell:
        return ["/bin/sh", "-c", command]
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise CommandFault("INVALID_FIELD", f"command: cannot be split into words: {error}") from None
    if not words or not words[0]:
        raise CommandFault("INVALID_FIELD", "command: has no words that could be run")
    return words


def check_env(env: dict[str, str]) -> dict[str, str]:
    """The variables as given. Raises CommandFault INVALID_FIELD."""
    for name, text in env.items():
        if not name or "=" in name or "\0" in name + text:
            raise CommandFault("INVALID_FIELD", f"env: {name!r} is no name of a variable, or its value holds a NUL")
    return env
