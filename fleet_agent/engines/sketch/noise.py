"""Noise fields made of +, -, *, / and floor alone, so that their values are the same on every processor."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from fleet_agent.engines.sketch.dice import Array, Dice

SIZE = 512  # texels of a tile's side; a tile repeats with period 1
_MASK = np.int32(SIZE - 1)
_BAND = 64


def smooth(t: Array) -> Array:
    """Ease 0..1 with no slope at either end."""
    eased: Array = t * t * (np.float32(3.0) - t * np.float32(2.0))
    return eased


def ramp(low: float, high: float, x: Array) -> Array:
    """Return 0 below `low`, 1 above `high`, eased between; `low` may exceed `high`."""
    t = (x - np.float32(low)) * np.float32(1.0 / (high - low))
    return smooth(np.clip(t, 0.0, 1.0, out=t))


def _periodic(lattice: Array, size: int) -> Array:
    """Upsample a square periodic lattice to size x size with eased interpolation."""
    n = lattice.shape[0]
    position = np.arange(size, dtype=np.int64) * n
    index = position // size
    t = smooth((position - index * size).astype(np.float32) / np.float32(size))
    rows = lattice[index]
    rows = rows + (lattice[(index + 1) % n] - rows) * t[:, None]
    left = rows[:, index]
    field: Array = left + (rows[:, (index + 1) % n] - left) * t[None, :]
    return field


def tile(dice: Dice, first: int, octaves: int, gain: float = 0.5, *, ridged: bool = False) -> Array:
    """Return a SIZE x SIZE repeating noise tile scaled to 0..1. `ridged` folds each octave into sharp crests."""
    total = np.zeros((SIZE, SIZE), np.float32)
    weight = 1.0
    for octave in range(octaves):
        n = min(first << octave, SIZE)
        layer = _periodic(dice.child("octave", octave).floats(n, n), SIZE)
        if ridged:
            layer = np.float32(1.0) - np.abs(layer * np.float32(2.0) - np.float32(1.0))
            layer = layer * layer
        total += layer * np.float32(weight)
        weight *= gain
    low, high = total.min(), total.max()
    scaled: Array = (total - low) / (high - low)
    return scaled


def _split(coordinate: Array) -> tuple[npt.NDArray[np.int32], Array]:
    scaled = coordinate * np.float32(SIZE)
    floor = np.floor(scaled)
    return floor.astype(np.int32), scaled - floor


def sample(field: Array, x: Array, y: Array) -> Array:
    """Read a tile at free coordinates (periods), bilinearly."""
    ix, tx = _split(x)
    iy, ty = _split(y)
    flat = field.ravel()
    left, right = ix & _MASK, (ix + np.int32(1)) & _MASK
    row, below = (iy & _MASK) * np.int32(SIZE), ((iy + np.int32(1)) & _MASK) * np.int32(SIZE)
    top = flat.take(row + left)
    top += (flat.take(row + right) - top) * tx
    bottom = flat.take(below + left)
    bottom += (flat.take(below + right) - bottom) * tx
    bottom -= top
    bottom *= ty
    top += bottom
    return top


def nearest(field: Array, x: Array, y: Array) -> Array:
    """Read a tile at free coordinates without interpolation: for far or busy textures."""
    ix = np.floor(x * np.float32(SIZE)).astype(np.int32) & _MASK
    iy = np.floor(y * np.float32(SIZE)).astype(np.int32) & _MASK
    value: Array = field.ravel().take(iy * np.int32(SIZE) + ix)
    return value


def grid(field: Array, xs: Array, ys: Array) -> Array:
    """Read a tile on the grid of `ys` (rows) and `xs` (columns), bilinearly; far cheaper than `sample`."""
    ix, tx = _split(xs.ravel())
    iy, ty = _split(ys.ravel())
    rows = field[iy & _MASK]
    rows = rows + (field[(iy + np.int32(1)) & _MASK] - rows) * ty[:, None]
    left = rows[:, ix & _MASK]
    right = rows[:, (ix + np.int32(1)) & _MASK]
    right -= left
    right *= tx[None, :]
    right += left
    field_on_grid: Array = right
    return field_on_grid


def line(dice: Dice, xs: Array, first: float, octaves: int, gain: float = 0.5, *, sharp: bool = False) -> Array:
    """Return a 1-D profile in about 0..1 over `xs` (any unit): eased hills, or with `sharp` jagged ridges."""
    total = np.zeros_like(xs)
    weight, norm = 1.0, 0.0
    for octave in range(octaves):
        lattice = dice.child("line", octave).floats(1024)
        position = xs * np.float32(first * (1 << octave)) + np.float32(37.0 * octave + 411.0)
        floor = np.floor(position)
        index = floor.astype(np.int32) & np.int32(1023)
        t = position - floor
        if not sharp:
            t = smooth(t)
        value = lattice[index]
        value = value + (lattice[(index + np.int32(1)) & np.int32(1023)] - value) * t
        total = total + value * np.float32(weight)
        norm += weight
        weight *= gain
    scaled: Array = total * np.float32(1.0 / norm)
    return scaled


def resize(planes: Array, height: int, width: int, check: Callable[[], None] = lambda: None) -> Array:
    """Scale (channels, h, w) to (channels, height, width), bilinearly, pixel centres aligned.

    Works in bands that stay in the processor's cache; `check` is called between them and may raise to stop.
    """
    channels, old_height, old_width = planes.shape
    if (old_height, old_width) == (height, width):
        return planes
    out = np.empty((channels, height, width), np.float32)
    above, below, ty = _taps(old_height, height)
    left, right, tx = _taps(old_width, width)
    for start in range(0, height, _BAND):
        check()
        rows = slice(start, min(start + _BAND, height))
        for channel in range(channels):
            low, high = planes[channel, above[rows]], planes[channel, below[rows]]
            high -= low
            high *= ty[rows, None]
            low += high
            near, far = low.take(left, axis=1), low.take(right, axis=1)
            far -= near
            far *= tx
            np.add(near, far, out=out[channel, rows])
    return out


def _taps(old: int, size: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], Array]:
    position = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(old / size) - np.float32(0.5)
    position = np.clip(position, 0.0, old - 1)
    index = np.floor(position).astype(np.int64)
    return index, np.minimum(index + 1, old - 1), (position - index).astype(np.float32)


def halve(planes: Array) -> Array:
    """Average 2 x 2 blocks of (channels, h, w); an odd last row or column is dropped (kept when it is the only)."""
    _, height, width = planes.shape
    if height > 1:
        even = height // 2 * 2
        planes = (planes[:, 0:even:2] + planes[:, 1:even:2]) * np.float32(0.5)
    if width > 1:
        even = width // 2 * 2
        planes = (planes[:, :, 0:even:2] + planes[:, :, 1:even:2]) * np.float32(0.5)
    return planes


def blur(planes: Array, rounds: int) -> Array:
    """Soften (channels, h, w) by `rounds` passes of a 1-4-6-4-1 filter, edges held."""
    for _ in range(rounds):
        for axis in (1, 2):
            size = planes.shape[axis]
            index = np.arange(size)
            total = planes * np.float32(6.0 / 16.0)
            for offset, weight in ((1, 4.0 / 16.0), (2, 1.0 / 16.0)):
                for signed in (offset, -offset):
                    shifted = planes.take(np.clip(index + signed, 0, size - 1), axis=axis)
                    total += shifted * np.float32(weight)
            planes = total
    return planes
