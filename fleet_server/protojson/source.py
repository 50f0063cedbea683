"""Source text of compiled functions: lines with indentation, the objects they name, and the one place that
runs it.
"""

from __future__ import annotations

import keyword
from collections.abc import Callable, Iterable
from typing import Any


class Source:
    """The functions of one family, sharing one global namespace, so that recursive messages find each other
    by name.
    """

    def __init__(self, **namespace: Any) -> None:
        self._namespace: dict[str, Any] = namespace
        self._count = 0

    def add(self, prefix: str, value: object) -> str:
        """Makes `value` known to the functions; returns its name there."""
        name = self.reserve(prefix)
        self._namespace[name] = value
        return name

    def reserve(self, prefix: str) -> str:
        """A new name, to be defined later."""
        self._count += 1
        return f"{prefix}{self._count}"

    def define(self, name: str, parameters: str, lines: Iterable[str]) -> Callable[..., Any]:
        """Compiles a function of this name from the lines of its body."""
        text = f"def {name}({parameters}):\n" + "\n".join(f"    {line}" for line in lines)
        # The text is made of descriptors that were compiled into the program, never of what a caller sent.
        exec(compile(text, f"<{name}>", "exec"), self._namespace)  # noqa: S102
        function: Callable[..., Any] = self._namespace[name]
        return function

    def assign(self, name: str, value: object) -> None:
        """Defines a reserved name."""
        self._namespace[name] = value


def attribute(name: str) -> str:
    """Reads field `name` of message m."""
    return f"getattr(m, {name!r})" if keyword.iskeyword(name) else f"m.{name}"


def assignment(name: str, value: str) -> str:
    """Sets field `name` of message m."""
    return f"setattr(m, {name!r}, {value})" if keyword.iskeyword(name) else f"m.{name} = {value}"


def indented(lines: Iterable[str]) -> list[str]:
    """The lines, one step deeper."""
    return [f"    {line}" for line in lines]
