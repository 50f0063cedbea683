"""The one judge of output names: a name that passes is one path segment and nothing else."""

from __future__ import annotations

import re

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def is_output_name(name: str) -> bool:
    """Whether `name` may name an output: letters, digits, `.`, `_`, `-`, not beginning with a mark, at most 128."""
    return _NAME.fullmatch(name) is not None
