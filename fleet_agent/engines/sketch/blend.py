"""How layers meet the canvas: planes of shape (3, rows, columns), values about 0..1."""

from __future__ import annotations

import numpy as np
from PIL import Image

from fleet_agent.engines.sketch.dice import Array


def over(band: Array, colour: Array, alpha: Array) -> None:
    """Lay a colour over a band. `colour` is (3,), (3, rows, 1) or (3, rows, columns); alpha broadcasts."""
    for channel in range(3):
        plane = band[channel]
        plane += (colour[channel] - plane) * alpha


def add(band: Array, colour: Array, amount: Array) -> None:
    """Add light of a colour (3,) to a band."""
    for channel in range(3):
        band[channel] += amount * colour[channel]


def shine(band: Array, colour: Array, amount: Array) -> None:
    """Add light of a colour (3,), the less the brighter a place is already."""
    for channel in range(3):
        plane = band[channel]
        plane += amount * colour[channel] * (np.float32(1.0) - np.clip(plane, 0.0, 1.0) * np.float32(0.7))


def stamp(planes: Array, xs: Array, ys: Array, radius: float, colour: Array, alpha: Array) -> None:
    """Blend many equal soft discs, centred at pixel positions (xs, ys), in order of neither."""
    _, height, width = planes.shape
    reach = max(1, int(np.ceil(radius + 0.5)))
    cx, cy = np.floor(xs).astype(np.int32), np.floor(ys).astype(np.int32)
    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            px, py = cx + dx, cy + dy
            ox, oy = px.astype(np.float32) + 0.5 - xs, py.astype(np.float32) + 0.5 - ys
            cover = np.clip(np.float32(radius + 0.5) - np.sqrt(ox * ox + oy * oy), 0.0, 1.0) * alpha
            keep = (px >= 0) & (px < width) & (py >= 0) & (py < height) & (cover > 0)
            kx, ky, kc = px[keep], py[keep], cover[keep]
            for channel in range(3):
                values = planes[channel, ky, kx]
                tint = colour[channel] if colour.ndim == 1 else colour[channel][keep]
                planes[channel, ky, kx] = values + (tint - values) * kc


def cover_of(mask: Image.Image, reduce: int) -> Array:
    """Return a supersampled "L" mask reduced to 0..1."""
    return np.asarray(mask.reduce(reduce) if reduce > 1 else mask, dtype=np.float32) * np.float32(1.0 / 255.0)
