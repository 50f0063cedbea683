"""Small things: castle, boat, cat, wanderer, birds, flowers, rain and snowfall."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from fleet_agent.engines.sketch.blend import cover_of, over, stamp
from fleet_agent.engines.sketch.dice import Array, Dice
from fleet_agent.engines.sketch.palettes import GROUND, NEAR, mix
from fleet_agent.engines.sketch.scene import Frame, Scene

Point = tuple[float, float]
Check = Callable[[], None]
_LAMP = np.array([1.0, 0.80, 0.42], np.float32)
_BLOSSOMS = ((0.95, 0.25, 0.22), (0.98, 0.82, 0.30), (0.97, 0.97, 0.95), (0.72, 0.42, 0.88), (0.98, 0.56, 0.70))


class Shape:
    """A silhouette drawn with supersampling into its own box, then laid over the canvas."""

    def __init__(self, frame: Frame, x: float, y: float, size: float) -> None:
        """(x, y) is the middle of its foot; shapes are drawn in -1..1 across and 0..2 up, times `size`."""
        self.frame, self.x, self.y, self.size = frame, x, y, size
        self.scale = 4
        unit = size * frame.pixels
        self.left, self.top = int(x * frame.pixels - unit * 1.1) - 1, int(y * frame.pixels - unit * 2.1) - 1
        side = (int(unit * 2.2) + 3, int(unit * 2.3) + 3)
        self.mask = Image.new("L", (side[0] * self.scale, side[1] * self.scale), 0)
        self.draw = ImageDraw.Draw(self.mask)

    def _at(self, point: Point) -> Point:
        px = (self.x + point[0] * self.size) * self.frame.pixels - self.left
        py = (self.y - point[1] * self.size) * self.frame.pixels - self.top
        return px * self.scale, py * self.scale

    def polygon(self, *points: Point, fill: int = 255) -> None:
        self.draw.polygon([self._at(p) for p in points], fill=fill)

    def ellipse(self, x: float, y: float, rx: float, ry: float, fill: int = 255) -> None:
        (x0, y1), (x1, y0) = self._at((x - rx, y - ry)), self._at((x + rx, y + ry))
        self.draw.ellipse((x0, y0, max(x0, x1), max(y0, y1)), fill=fill)

    def stroke(self, *points: Point, width: float) -> None:
        pixels = max(1, int(width * self.size * self.frame.pixels * self.scale))
        self.draw.line([self._at(p) for p in points], fill=255, width=pixels, joint="curve")

    def lay(self, canvas: Array, colour: Array) -> None:
        cover = cover_of(self.mask, self.scale)
        top, left = max(0, self.top), max(0, self.left)
        bottom = min(canvas.shape[1], self.top + cover.shape[0])
        right = min(canvas.shape[2], self.left + cover.shape[1])
        if top < bottom and left < right:
            part = cover[top - self.top : bottom - self.top, left - self.left : right - self.left]
            over(canvas[:, top:bottom, left:right], colour, part)


def castle(canvas: Array, scene: Scene, frame: Frame, x: float, y: float) -> None:
    """A keep with towers on a rise, its windows lit."""
    dice = scene.dice.child("castle")
    size = 0.15
    towers = [(-0.62, 0.16, 0.95), (-0.28, 0.13, 1.30), (0.06, 0.20, 1.05), (0.40, 0.12, 1.45), (0.72, 0.15, 0.85)]
    body = mix(mix(scene.colour(NEAR), scene.colour(GROUND), 0.4), scene.haze, 0.22)
    shape = Shape(frame, x, y, size)
    shape.polygon((-1.1, -0.05), (-0.8, 0.12), (0.85, 0.12), (1.1, -0.05))
    shape.polygon((-0.72, 0.0), (-0.72, 0.62), (0.78, 0.62), (0.78, 0.0))
    for k in range(13):
        shape.polygon(*((-0.72 + 0.117 * k + dx, 0.60 + dy) for dx, dy in ((0, 0), (0, 0.09), (0.06, 0.09), (0.06, 0))))
    towers = [(cx, half, tall * dice.between(0.92, 1.08)) for cx, half, tall in towers]
    for cx, half, tall in towers:
        shape.polygon((cx - half, 0.0), (cx - half, tall), (cx + half, tall), (cx + half, 0.0))
        shape.polygon((cx - half * 1.35, tall), (cx, tall + half * 3.0), (cx + half * 1.35, tall))
        shape.stroke((cx, tall + half * 2.9), (cx, tall + half * 3.7), width=0.014)
        shape.polygon((cx, tall + half * 3.7), (cx + 0.13, tall + half * 3.5), (cx, tall + half * 3.3))
    shape.lay(canvas, body)
    lamps = Shape(frame, x, y, size)
    for cx, half, tall in towers:
        for level in (0.80, 0.55):
            left, right, low = cx - 0.2 * half, cx + 0.2 * half, tall * level
            lamps.polygon((left, low), (left, low + 0.09), (right, low + 0.09), (right, low))
    lamps.lay(canvas, mix(body, _LAMP, 0.25 if scene.mood in ("day", "winter") else 0.95))


def boat(canvas: Array, scene: Scene, frame: Frame, x: float, y: float) -> None:
    """A small sailing boat, with its reflection."""
    for mirrored in (True, False):
        shape = Shape(frame, x, y + (0.105 if mirrored else 0.0), 0.05)

        def at(px: float, py: float, down: bool = mirrored) -> Point:
            return (px, 2.0 - py) if down else (px, py)

        shape.polygon(at(-0.75, 0.28), at(0.80, 0.30), at(0.52, 0.02), at(-0.50, 0.02))
        shape.polygon(at(0.02, 0.36), at(0.02, 1.9), at(0.72, 0.42))
        shape.polygon(at(-0.04, 0.40), at(-0.04, 1.6), at(-0.55, 0.42))
        dark = mix(scene.colour(GROUND), scene.colour(NEAR), 0.3)
        if mirrored:
            shape.mask = shape.mask.point([value // 3 for value in range(256)])
        shape.lay(canvas, dark)


def cat(canvas: Array, scene: Scene, frame: Frame, x: float, y: float) -> None:
    """A cat sitting with its back to us."""
    shape = Shape(frame, x, y, 0.085)
    shape.ellipse(0.0, 0.48, 0.42, 0.56)
    shape.ellipse(0.0, 0.16, 0.50, 0.24)
    shape.ellipse(0.02, 1.16, 0.30, 0.27)
    shape.polygon((-0.27, 1.20), (-0.27, 1.66), (-0.02, 1.38))
    shape.polygon((0.31, 1.20), (0.31, 1.66), (0.06, 1.38))
    shape.stroke((0.40, 0.10), (0.72, 0.12), (0.88, 0.32), (0.84, 0.56), (0.94, 0.70), width=0.13)
    shape.lay(canvas, scene.colour(GROUND) * np.float32(0.45))


def wanderer(canvas: Array, scene: Scene, frame: Frame, x: float, y: float) -> None:
    """A person in a long coat, standing with a staff."""
    shape = Shape(frame, x, y, 0.085)
    shape.polygon((-0.34, 0.0), (-0.24, 1.22), (-0.12, 1.46), (0.12, 1.46), (0.22, 1.22), (0.30, 0.0), (0.05, 0.08))
    shape.ellipse(0.0, 1.62, 0.14, 0.17)
    shape.polygon((-0.17, 1.62), (0.0, 1.86), (0.17, 1.62), (0.15, 1.50), (-0.15, 1.50))
    shape.stroke((0.18, 1.12), (0.46, 0.86), width=0.09)
    shape.stroke((0.48, 0.0), (0.46, 1.55), width=0.045)
    shape.lay(canvas, scene.colour(GROUND) * np.float32(0.45))


def birds(canvas: Array, scene: Scene, frame: Frame) -> None:
    """A flock, small and far."""
    dice = scene.dice.child("birds")
    x0, y0 = dice.between(0.25, 0.7) * scene.right, dice.between(0.35, 0.6) * scene.horizon
    colour = mix(scene.colour(NEAR), scene.haze, 0.15)
    for _ in range(7 + dice.below(6)):
        size = dice.between(0.007, 0.014)
        shape = Shape(frame, x0 + dice.between(-0.13, 0.13), y0 + dice.between(-0.07, 0.07), size)
        lift = dice.between(0.35, 0.9)
        left, right = (-0.5, 1.0 + lift), (0.5, 1.0 + lift)
        shape.stroke((-1.0, 1.0 + lift * 0.5), left, (0.0, 1.0), right, (1.0, 1.0 + lift * 0.4), width=0.17)
        shape.lay(canvas, colour)


def flowers(canvas: Array, scene: Scene, frame: Frame, top: float, check: Check) -> None:
    """Blossoms strewn over the meadow, growing towards the viewer and thinning with distance."""
    dice = scene.dice.child("flowers")
    named = scene.accents or tuple(_BLOSSOMS[dice.below(len(_BLOSSOMS))] for _ in range(3))
    colours = np.array((*named, *named[:1], _BLOSSOMS[dice.below(len(_BLOSSOMS))]), np.float32)
    for index in range(7):
        check()
        t = (index + 1) / 7.0
        depth = t * t
        count = int((420 - 45 * index) * scene.right)
        draws = dice.child("patch", index).floats(5, count)
        spread = scene.bottom - top
        xs = draws[0] * np.float32(frame.width)
        centre = top + spread * (0.05 + 0.92 * depth)
        ys = (np.float32(centre) + (draws[1] - 0.5) * np.float32(0.16 * t * spread + 0.02)) * np.float32(frame.pixels)
        choice = np.floor(draws[2] * np.float32(len(colours) - 0.001)).astype(np.int32)
        light = np.float32(0.35 if scene.dark else 0.72) + draws[3] * np.float32(0.28)
        tint = np.moveaxis(colours[choice], -1, 0) * light
        tint = tint + (scene.haze[:, None] - tint) * np.float32(0.30 * (1.0 - t))
        radius = (0.0011 + 0.0062 * depth) * frame.pixels
        stamp(canvas, xs, ys, max(0.35, radius), tint.astype(np.float32), np.float32(min(1.0, 0.5 + radius)) + 0 * xs)
        if radius > 2.5:
            stamp(canvas, xs, ys, radius * 0.34, _LAMP * np.float32(0.9), np.float32(0.8) + 0 * xs)


def grass(canvas: Array, scene: Scene, frame: Frame, base: float, tall: float) -> None:
    """Blades against the light along the lower edge."""
    dice = scene.dice.child("grass")
    top = frame.row(base - tall * 1.2)
    scale = 2
    mask = Image.new("L", (frame.width * scale, max(1, frame.height - top) * scale), 0)
    draw = ImageDraw.Draw(mask)
    unit = frame.pixels * scale
    foot = (frame.height - top) * scale
    for _ in range(int(330 * scene.right)):
        x = dice.between(-0.02, scene.right + 0.02)
        rise = tall * dice.between(0.25, 1.0) * (0.45 + 0.55 * abs(2.0 * x / scene.right - 1.0))
        lean, half = dice.between(-0.35, 0.35) * rise, 0.0016 + dice.between(0, 0.0016)
        y = foot - (scene.bottom - base + rise) * unit
        draw.polygon([((x - half) * unit, foot), ((x + lean) * unit, y), ((x + half) * unit, foot)], fill=255)
    over(canvas[:, top:], scene.colour(GROUND) * np.float32(0.62), cover_of(mask, scale))


def rain(canvas: Array, scene: Scene, frame: Frame, check: Check) -> None:
    """Slanted streaks in two depths."""
    dice = scene.dice.child("rain")
    _streaks(canvas, frame, dice, int(520 * scene.right * scene.bottom), 0.055, 0.16)
    check()
    _streaks(canvas, frame, dice.child("near"), int(130 * scene.right * scene.bottom), 0.11, 0.22)


def _streaks(canvas: Array, frame: Frame, dice: Dice, count: int, length: float, alpha: float) -> None:
    mask = Image.new("L", (frame.width * 2, frame.height * 2), 0)
    draw = ImageDraw.Draw(mask)
    unit = frame.pixels * 2
    for _ in range(count):
        x, y = dice.between(-0.1, frame.right + 0.1) * unit, dice.between(-0.1, frame.bottom) * unit
        long = length * dice.between(0.5, 1.0) * unit
        draw.line((x, y, x - long * 0.16, y + long), fill=90 + dice.below(130), width=1)
    over(canvas, np.array([0.86, 0.90, 0.96], np.float32), cover_of(mask, 2) * np.float32(alpha * 1.6))


def snowfall(canvas: Array, scene: Scene, frame: Frame, check: Check) -> None:
    """Flakes in three depths, the nearest large and faint."""
    dice = scene.dice.child("snowfall")
    white = np.array([0.98, 0.99, 1.0], np.float32)
    for index, (count, radius, alpha) in enumerate(((900, 0.0011, 0.75), (260, 0.0026, 0.62), (46, 0.0062, 0.34))):
        check()
        draws = dice.child(index).floats(3, int(count * scene.right * scene.bottom))
        xs, ys = draws[0] * np.float32(frame.width), draws[1] * np.float32(frame.height)
        stamp(canvas, xs, ys, max(0.3, radius * frame.pixels), white, (draws[2] * 0.6 + 0.4) * np.float32(alpha))
