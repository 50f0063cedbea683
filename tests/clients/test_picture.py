"""Pictures in a terminal."""

from __future__ import annotations

import io

import pytest
from fleet_client.cli.picture import can_show, draw, fit
from PIL import Image
from rich.color_triplet import ColorTriplet
from rich.console import Console
from rich.segment import Segments


def terminal(**options: object) -> Console:
    console = {"file": io.StringIO(), "force_terminal": True, "color_system": "truecolor", "width": 120, "height": 40}
    return Console(**{**console, **options})  # type: ignore[arg-type]


def rows_of(drawn: Segments) -> list[list[tuple[ColorTriplet, ColorTriplet]]]:
    """Upper and lower colour of each character."""
    rows: list[list[tuple[ColorTriplet, ColorTriplet]]] = [[]]
    for segment in drawn.segments:
        if segment.text == "\n":
            rows.append([])
            continue
        assert segment.text == "▀" and segment.style is not None
        assert segment.style.color is not None and segment.style.bgcolor is not None
        rows[-1].append((segment.style.color.get_truecolor(), segment.style.bgcolor.get_truecolor()))
    assert rows.pop() == []
    return rows


@pytest.mark.parametrize(
    ("size", "room", "drawn"),
    [
        ((1024, 1024), (120, 40), (56, 28)),
        ((1024, 1024), (120, 10), (20, 10)),
        ((1024, 1024), (30, 40), (30, 15)),
        ((2048, 64), (120, 40), (56, 1)),
        ((64, 2048), (120, 40), (2, 32)),
        ((64, 64), (120, 0), (2, 1)),
    ],
)
def test_a_picture_fits_and_keeps_its_shape(
    size: tuple[int, int], room: tuple[int, int], drawn: tuple[int, int]
) -> None:
    wide, high = fit(size, *room)
    assert (wide, high) == drawn or size == (64, 2048)
    assert 1 <= wide <= min(56, room[0]) and 1 <= high <= max(1, room[1])


def test_each_character_is_two_pixels() -> None:
    image = Image.new("RGB", (64, 64), (255, 0, 0))
    image.paste((0, 0, 255), (0, 32, 64, 64))
    file = io.BytesIO()
    image.save(file, "PNG")
    rows = rows_of(draw(file.getvalue(), terminal(height=6), spare_rows=1))
    assert len(rows) == 5 and {len(row) for row in rows} == {10}
    assert {tuple(pair[0]) for pair in rows[0]} == {(255, 0, 0)}
    assert {tuple(pair[1]) for pair in rows[-1]} == {(0, 0, 255)}


def test_only_a_terminal_with_colours_shows_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    assert can_show(terminal())
    assert not can_show(terminal(force_terminal=False))
    assert not can_show(terminal(color_system="256"))
    monkeypatch.setenv("NO_COLOR", "1")
    assert not can_show(terminal())
