"""`python -m fleet_agent`: an agent with the settings of its environment; ends with the process FLEET_AGENT_PARENT."""

from __future__ import annotations

import gc
import os
import sys

from fleet_agent.parent import die_with_parent


def main() -> int:
    """Runs the agent; the exit code is 0 after a stop, 2 for bad settings, 3 where the folder cannot be used."""
    parent = os.environ.get("FLEET_AGENT_PARENT")
    if parent:
        die_with_parent(int(parent))
    # Nothing of what is imported is garbage: to look for some again and again is a tenth of the start.
    gc.disable()
    from pydantic import ValidationError

    from fleet_agent.agent import main as run
    from fleet_agent.settings import AgentSettings

    gc.freeze()
    gc.enable()
    try:
        settings = AgentSettings()
    except ValidationError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return run(settings)


if __name__ == "__main__":
    raise SystemExit(main())
