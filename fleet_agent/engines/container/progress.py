"""How far a program is, from what it prints: lines `FLEET_PROGRESS 0.4`, or the bars of tqdm."""

from __future__ import annotations

import re

_OURS = re.compile(r"\AFLEET_PROGRESS[ =:]+(\d+(?:\.\d+)?|\.\d+)\s*(.*)\Z")
_TQDM = re.compile(r"(\d{1,3})%\|")
_ENDS = re.compile(r"\r\n|\n|\r")
_LONGEST = 65_536
_KEPT_LINES = 20


class Lines:
    """Puts pieces of output together to lines. A bar that is drawn anew is a line each time."""

    def __init__(self) -> None:
        self._rest = ""
        self.last: list[str] = []
        """The latest of them, for a failure to show."""

    def heard(self, data: bytes) -> list[str]:
        """The lines that are whole now."""
        *lines, self._rest = _ENDS.split(self._rest + data.decode(errors="replace"))
        self._rest = self._rest[-_LONGEST:]
        said = [line[:_LONGEST].strip() for line in lines if line.strip()]
        self.last = [*self.last, *said][-_KEPT_LINES:]
        return said

    def rest(self) -> list[str]:
        """The line that was not ended."""
        return self.heard(b"\n") if self._rest else []


def percent_of(line: str) -> int | None:
    """Whole percent; None where the line does not say."""
    ours = _OURS.match(line)
    if ours is not None:
        return min(100, max(0, int(float(ours[1]) * 100 + 1e-9)))
    bar = _TQDM.search(line)
    return min(100, int(bar[1])) if bar is not None else None
