"""The one error of the converters."""

from __future__ import annotations

import json

INVALID_FIELD = "INVALID_FIELD"
UNKNOWN_FIELD = "UNKNOWN_FIELD"
MALFORMED_JSON = "MALFORMED_JSON"

_SHOWN = 64


class JsonError(Exception):
    """JSON that cannot become the message, and where.

    `path` is the place as the caller wrote it (`jobs[3].payload.steps`; "" for the whole body), `description`
    says what is wrong and what to do, `reason` is INVALID_FIELD, UNKNOWN_FIELD or MALFORMED_JSON. The path
    grows from the inside out while the error rises, so that nobody pays for it on the good road.
    """

    def __init__(self, description: str, *, path: str = "", reason: str = INVALID_FIELD) -> None:
        super().__init__(description)
        self.path = path
        self.description = description
        self.reason = reason

    def within(self, prefix: str) -> JsonError:
        """Puts `prefix` before the path; returns itself."""
        self.path = join(prefix, self.path)
        return self

    def __str__(self) -> str:
        return f"{self.path}: {self.description}" if self.path else self.description


def join(prefix: str, path: str) -> str:
    """`jobs[3]` and `payload.steps` as one path; an index needs no dot."""
    if not prefix or not path or path.startswith("["):
        return prefix + path
    return f"{prefix}.{path}"


def step(key: str) -> str:
    """A key that callers choose, as part of a path; long, unprintable and empty ones in brackets."""
    return key if 0 < len(key) <= _SHOWN and key.isprintable() else f"[{shown(key)}]"


def shown(value: object) -> str:
    """What came, for an error message: numbers and words in short, of other things only their kind."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case int() if not -(1 << 80) < value < 1 << 80:
            return "a number of many digits"
        case int() | float():
            return repr(value)
        case str():
            cut = value if len(value) <= _SHOWN else value[:_SHOWN] + "..."
            return f'"{cut}"' if cut.isprintable() else json.dumps(cut)
        case dict():
            return "an object"
        case list():
            return "a list"
        case _:
            return f"a {type(value).__name__}"
