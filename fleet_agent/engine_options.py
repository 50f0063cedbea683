"""Options of engines: from the agent's settings to the slots' children, in one variable of their environment."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from types import MappingProxyType

NO_OPTIONS: Mapping[str, str] = MappingProxyType({})
_VARIABLE = "FLEET_ENGINE_OPTIONS"


def as_environment(options: Mapping[str, str]) -> dict[str, str]:
    """What a child's environment needs for `engine_options` to give these."""
    return {_VARIABLE: json.dumps(dict(options))} if options else {}


def engine_options() -> dict[str, str]:
    """The options that this process was given by its agent."""
    options: dict[str, str] = json.loads(os.environ.get(_VARIABLE, "{}"))
    return options
