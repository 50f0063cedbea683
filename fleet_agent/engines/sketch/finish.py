"""The last touches: grading, bloom, outline, paper and grain. And small pictures for previews."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from fleet_agent.engines.sketch.dice import Array, Dice
from fleet_agent.engines.sketch.noise import blur, grid, halve, resize, tile
from fleet_agent.engines.sketch.scene import Frame
from fleet_agent.engines.sketch.style import Style
from fleet_agent.engines.sketch.words import Reading


@dataclass(frozen=True, slots=True)
class Grade:
    """How the finished canvas is toned. 0 is neutral for all but contrast and saturation (1)."""

    contrast: float
    saturation: float
    warmth: float
    gamma: float
    glow: float
    outline: float
    paper: float
    grain: float
    sharpen: float
    flatten: float


def grade_of(style: Style, reading: Reading, guidance: float) -> Grade:
    """Guidance pulls contrast and colour; the negative prompt's words push the other way from what they name."""
    pull = min(guidance, 30.0) - 7.5
    effect = style.effects
    return Grade(
        contrast=1.06 + pull * (0.030 if pull < 0 else 0.016) + 0.25 * effect["contrast"],
        saturation=1.08 + pull * (0.055 if pull < 0 else 0.026) + 0.5 * effect["saturation"] + 0.3 * reading.saturate,
        warmth=0.06 * effect["warmth"],
        gamma=0.28 * reading.lighten,
        glow=max(0.0, effect["glow"] * (1.0 + 0.02 * pull)),
        outline=effect["outline"],
        paper=effect["paper"],
        grain=0.022 * max(0.0, effect["texture"]) * (1.0 - 0.8 * reading.clean) + 0.004,
        sharpen=0.55 * reading.sharpen,
        flatten=effect["flatten"],
    )


def finish(canvas: Array, grade: Grade, dice: Dice, check: Callable[[], None]) -> npt.NDArray[np.uint8]:
    """Return the canvas toned and textured, as bytes of shape (height, width, 3)."""
    _, height, width = canvas.shape
    bloom = _bloom(canvas, grade, check)
    out = np.empty((height, width, 3), np.uint8)
    frame = Frame(width, height)
    grain = dice.child("grain").floats(256, 512) - np.float32(0.5)
    paper = tile(dice.child("paper"), 32, 4, 0.6) if grade.paper else None
    for rows in frame.bands():
        check()
        band = canvas[:, rows].copy()
        if grade.sharpen:
            band += _detail(canvas, rows) * np.float32(grade.sharpen)
        if grade.outline:
            band *= _outline(canvas, rows, grade.outline)
        if bloom is not None:
            light = resize(_rows_of(bloom, rows, height), rows.stop - rows.start, width)
            band += light
        _tone(band, grade)
        if paper is not None:
            fibre = grid(paper, frame.xs * np.float32(1.7), frame.ys[rows] * np.float32(1.7))
            band *= np.float32(1.0) + (fibre - np.float32(0.55)) * np.float32(0.34 * grade.paper)
        _vignette(band, frame, rows)
        index = (np.arange(rows.start, rows.stop) * 7 + (np.arange(rows.start, rows.stop) // 256) * 31) & 255
        speck = np.tile(grain[index], (1, -(-width // 512)))[:, :width]
        band += speck * np.float32(grade.grain)
        out[rows] = _bytes(band)
    return out


def quick(canvas: Array, grade: Grade, height: int, width: int) -> npt.NDArray[np.uint8]:
    """Return the canvas toned at another size, without its texture: for previews."""
    small = canvas
    while small.shape[1] >= 2 * height and small.shape[2] >= 2 * width:
        small = halve(small)
    small = resize(small, height, width).copy()
    _tone(small, grade)
    _vignette(small, Frame(width, height), slice(0, height))
    return _bytes(small)


def shrink(picture: npt.NDArray[np.uint8], side: int) -> npt.NDArray[np.uint8]:
    """Return a finished picture at most `side` pixels wide and high."""
    height, width, _ = picture.shape
    scale = side / max(width, height)
    if scale >= 1.0:
        return picture
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BOX))


def _bytes(band: Array) -> npt.NDArray[np.uint8]:
    scaled = band * np.float32(255.0) + np.float32(0.5)
    pixels: npt.NDArray[np.uint8] = np.clip(scaled, 0.0, 255.0).astype(np.uint8).transpose(1, 2, 0)
    return pixels


def _tone(band: Array, grade: Grade) -> None:
    grey = band[0] * np.float32(0.299) + band[1] * np.float32(0.587) + band[2] * np.float32(0.114)
    keep, gain = np.float32(grade.saturation * grade.contrast), np.float32((1 - grade.saturation) * grade.contrast)
    base = grey * gain + np.float32(0.42 * (1.0 - grade.contrast))
    band *= keep
    band += base
    if grade.warmth:
        band[0] += np.float32(grade.warmth)
        band[2] -= np.float32(grade.warmth)
    if grade.flatten:
        stepped = np.floor(band * np.float32(7.0) + np.float32(0.5)) * np.float32(1.0 / 7.0)
        band += (stepped - band) * np.float32(min(1.0, grade.flatten))
    np.clip(band, 0.0, 1.6, out=band)
    # Bright light rolls off instead of clipping; below 0.75 nothing changes.
    over = np.maximum(band - np.float32(0.75), np.float32(0.0))
    band -= over
    band += over / (np.float32(1.0) + over * np.float32(1.9))
    if grade.gamma:
        band += band * (np.float32(1.0) - band) * np.float32(grade.gamma)


def _vignette(band: Array, frame: Frame, rows: slice) -> None:
    dx = frame.xs * np.float32(2.0 / frame.right) - np.float32(1.0)
    dy = frame.ys[rows] * np.float32(2.0 / frame.bottom) - np.float32(1.0)
    band *= np.float32(1.03) - (dx * dx) * np.float32(0.075) - (dy * dy) * np.float32(0.055)


def _bloom(canvas: Array, grade: Grade, check: Callable[[], None]) -> Array | None:
    if grade.glow <= 0.0 or min(canvas.shape[1:]) < 16:
        return None
    small = canvas
    while max(small.shape[1:]) > 192 and min(small.shape[1:]) > 16:
        check()
        small = np.stack([halve(plane[None])[0] for plane in small])
    check()
    bright = np.maximum(small - np.float32(0.62), np.float32(0.0))
    near = blur(bright, 2)
    far = blur(halve(near), 4)
    wide = resize(far, *near.shape[1:])
    return (near * np.float32(0.55) + wide * np.float32(0.75)) * np.float32(grade.glow)


def _rows_of(bloom: Array, rows: slice, height: int) -> Array:
    """Upsample bloom to these rows only, in y; the columns follow."""
    position = (np.arange(rows.start, rows.stop, dtype=np.float32) + np.float32(0.5)) * np.float32(
        bloom.shape[1] / height
    ) - np.float32(0.5)
    position = np.clip(position, 0.0, bloom.shape[1] - 1)
    index = np.floor(position).astype(np.int64)
    t = (position - index).astype(np.float32)[None, :, None]
    low = bloom[:, index]
    rows_of: Array = low + (bloom[:, np.minimum(index + 1, bloom.shape[1] - 1)] - low) * t
    return rows_of


def _neighbours(canvas: Array, rows: slice) -> tuple[Array, Array, Array]:
    """The rows themselves, those one above and those one below, edges held."""
    last = canvas.shape[1] - 1
    index = np.arange(rows.start, rows.stop)
    return canvas[:, rows], canvas[:, np.maximum(index - 1, 0)], canvas[:, np.minimum(index + 1, last)]


def _detail(canvas: Array, rows: slice) -> Array:
    here, above, below = _neighbours(canvas, rows)
    detail = here * np.float32(4.0) - above - below
    detail[:, :, 1:-1] -= here[:, :, :-2] + here[:, :, 2:]
    detail[:, :, 0] -= here[:, :, 0] * np.float32(2.0)
    detail[:, :, -1] -= here[:, :, -1] * np.float32(2.0)
    held: Array = np.clip(detail * np.float32(0.5), -0.12, 0.12)
    return held


def _outline(canvas: Array, rows: slice, strength: float) -> Array:
    here, above, below = _neighbours(canvas, rows)
    edge = np.abs(below - above)
    edge[:, :, 1:-1] += np.abs(here[:, :, 2:] - here[:, :, :-2])
    total = np.clip((edge[0] + edge[1] + edge[2]) * np.float32(1.5) - np.float32(0.10), 0.0, 1.0)
    factor: Array = np.float32(1.0) - total * np.float32(0.85 * strength)
    return factor
