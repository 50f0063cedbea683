"""Small plots for a terminal. Pure."""

from __future__ import annotations

from collections.abc import Sequence

_BLOCKS = "▁▂▃▄▅▆▇█"
_GAP = " "


def sparkline(values: Sequence[float | None], *, width: int = 60, low: float = 0.0, high: float | None = None) -> str:
    """The values in one line, oldest first, at most `width` characters: each shows the mean of its share, a gap where
    nothing is known. `high` is the top of the scale, the largest value where left out."""
    if not values or all(value is None for value in values):
        return ""
    columns = _columns(values, width)
    top = high if high is not None else max((value for value in columns if value is not None), default=low)
    reach = max(top - low, 1e-9)
    return "".join(
        _GAP if value is None else _BLOCKS[min(7, max(0, int((value - low) / reach * 8)))] for value in columns
    )


def _columns(values: Sequence[float | None], width: int) -> list[float | None]:
    count = min(width, len(values))
    columns: list[float | None] = []
    for index in range(count):
        share = values[index * len(values) // count : (index + 1) * len(values) // count]
        known = [value for value in share if value is not None]
        columns.append(sum(known) / len(known) if known else None)
    return columns
