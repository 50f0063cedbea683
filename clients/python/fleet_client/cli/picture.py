"""Draws a picture in a terminal, two pixels a character, in 24-bit colour."""

from __future__ import annotations

import io

from PIL import Image
from rich.color import Color
from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style

_MOST_COLUMNS = 56


def can_show(console: Console) -> bool:
    """Whether this terminal shows 24-bit colour, and may."""
    return console.is_terminal and console.color_system == "truecolor" and not console.no_color


def draw(data: bytes, console: Console, *, spare_rows: int) -> Segments:
    """An encoded picture, as large as fits into the terminal with some rows to spare."""
    with Image.open(io.BytesIO(data)) as image:
        columns, rows = fit(image.size, console.width, console.height - spare_rows)
        small = image.convert("RGB").resize((columns, rows * 2), Image.Resampling.BOX)
    raw = small.tobytes()
    segments: list[Segment] = []
    for row in range(rows):
        upper, lower = row * 2 * columns * 3, (row * 2 + 1) * columns * 3
        for at in range(0, columns * 3, 3):
            style = Style(color=_pixel(raw, upper + at), bgcolor=_pixel(raw, lower + at))
            segments.append(Segment("▀", style))
        segments.append(Segment.line())
    return Segments(segments)


def fit(size: tuple[int, int], columns: int, rows: int) -> tuple[int, int]:
    """Columns and rows of characters for a picture of that size; a character is twice as high as wide."""
    width, height = size
    wide = max(1, min(columns, _MOST_COLUMNS, round(max(1, rows) * 2 * width / height)))
    return wide, max(1, min(rows, round(height / width * wide / 2)))


def _pixel(raw: bytes, at: int) -> Color:
    return Color.from_rgb(raw[at], raw[at + 1], raw[at + 2])
