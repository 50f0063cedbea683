"""Draws a picture in a terminal, two pixels a character, in 24-bit colour."""

from __future__ import annotations

import io
import os

from PIL import Image
from rich.color import Color
from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style


def can_show(console: Console) -> bool:
    """Whether this terminal shows 24-bit colour."""
    return console.is_terminal and console.color_system == "truecolor" and "NO_COLOR" not in os.environ


def draw(data: bytes, columns: int) -> Segments:
    """An encoded picture, `columns` wide."""
    with Image.open(io.BytesIO(data)) as image:
        rows = max(1, round(image.height / image.width * columns / 2))
        small = image.convert("RGB").resize((columns, rows * 2), Image.Resampling.BILINEAR)
    raw = small.tobytes()

    def pixel(x: int, y: int) -> Color:
        at = (y * columns + x) * 3
        return Color.from_rgb(raw[at], raw[at + 1], raw[at + 2])

    segments: list[Segment] = []
    for row in range(rows):
        for x in range(columns):
            style = Style(color=pixel(x, row * 2), bgcolor=pixel(x, row * 2 + 1))
            segments.append(Segment("▀", style))
        segments.append(Segment.line())
    return Segments(segments)
