"""`python -m fleet_agent.ssh`: the steward of one node, as FLEET_SSH_* and FLEET_AGENT_* say."""

from __future__ import annotations

import asyncio
import os
import sys

import uvloop
from pydantic import ValidationError

from fleet_agent.agent import FolderError
from fleet_agent.identity import IdentityError
from fleet_agent.logs import configure
from fleet_agent.parent import die_with_parent
from fleet_agent.settings import AgentSettings
from fleet_agent.ssh.steward import SshSettings, run_steward


def main() -> int:
    """Runs it; the exit code is 0 after a stop, 2 for bad settings, else as an agent's."""
    parent = os.environ.get("FLEET_AGENT_PARENT")
    if parent:
        die_with_parent(int(parent))
    try:
        settings, address = AgentSettings(), SshSettings().address  # type: ignore[call-arg]  # from the environment
    except ValidationError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    configure(settings.log_level)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(run_steward(settings, address))
    except FolderError as error:
        sys.stderr.write(f"{error}\n")
        return 3
    except IdentityError as error:
        sys.stderr.write(f"{error}\n")
        return 4
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
