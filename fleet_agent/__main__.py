"""`python -m fleet_agent`: an agent with the settings of its environment; ends with the process FLEET_AGENT_PARENT."""

from __future__ import annotations

import os
import sys

from pydantic import ValidationError

from fleet_agent.agent import main as run
from fleet_agent.parent import die_with_parent
from fleet_agent.settings import AgentSettings


def main() -> int:
    """Runs the agent; the exit code is 0 after a stop, 2 for bad settings, 3 where the folder cannot be used."""
    parent = os.environ.get("FLEET_AGENT_PARENT")
    if parent:
        die_with_parent(int(parent))
    try:
        settings = AgentSettings()
    except ValidationError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return run(settings)


if __name__ == "__main__":
    raise SystemExit(main())
