"""`python -m tests.containers.crashing`: an agent that ends as by SIGKILL at the point that a test names.

The file at CRASH_POINT holds the name; whoever reaches the point takes the file away first, so each is good once:
`begun` (the command is written down, nothing was done), `made` (there is a container that was not started), `started`
(it runs), `ended` (the end is written down, nobody was told).
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

from docker.models.containers import Container
from fleet.v1 import command_pb2

from fleet_agent.__main__ import main
from fleet_agent.commands.journal import CommandJournal


def install(path: Path) -> None:
    """Puts the points where they belong."""

    def reach(point: str) -> None:
        try:
            found = path.read_text()
        except OSError:
            return
        if found == point:
            path.unlink()
            os.kill(os.getpid(), signal.SIGKILL)

    begin, end, start = CommandJournal.begin, CommandJournal.end, Container.start

    async def begun(journal: CommandJournal, command_id: str) -> command_pb2.CommandEnd | None:
        known = await begin(journal, command_id)
        if known is None:
            reach("begun")
        return known

    async def ended(journal: CommandJournal, command_id: str, outcome: command_pb2.CommandEnd) -> None:
        await end(journal, command_id, outcome)
        reach("ended")

    def started(container: Container) -> None:
        reach("made")
        start(container)
        reach("started")

    for place, name, instead in ((CommandJournal, "begin", begun), (CommandJournal, "end", ended)):
        setattr(place, name, instead)
    Container.start = started  # type: ignore[assignment,method-assign]


if __name__ == "__main__":
    install(Path(os.environ["CRASH_POINT"]))
    raise SystemExit(main())
