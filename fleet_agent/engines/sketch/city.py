"""A skyline in depth: towers with lit windows, spires and signs, fading into the haze."""

from __future__ import annotations

import numpy as np

from fleet_agent.engines.sketch.blend import over
from fleet_agent.engines.sketch.dice import Array, Dice
from fleet_agent.engines.sketch.land import Slope
from fleet_agent.engines.sketch.noise import ramp
from fleet_agent.engines.sketch.palettes import LIGHT, NEAR, mix
from fleet_agent.engines.sketch.scene import Frame, Scene

_WARM = ((1.0, 0.83, 0.50), (1.0, 0.90, 0.68), (1.0, 0.70, 0.36), (0.86, 0.92, 1.0))
_NEON = ((0.20, 0.95, 1.0), (1.0, 0.25, 0.75), (0.62, 0.35, 1.0), (1.0, 0.82, 0.40))


class Skyline(Slope):
    """One row of buildings. Windows fade to their mean colour where they are smaller than a pixel."""

    def __init__(self, scene: Scene, frame: Frame, index: int, count: int) -> None:
        dice = scene.dice.child("skyline", index)
        self.nearness = index / max(1, count - 1)
        t = self.nearness
        self.foot = scene.horizon + 0.004
        self.floor = (0.0085 + 0.004 * t) * dice.between(0.9, 1.1)
        self.bay = self.floor * dice.between(0.62, 0.9)
        lefts, tops = _buildings(dice, scene, t)
        column = np.clip(np.searchsorted(lefts, frame.xs.ravel(), side="right") - 1, 0, len(lefts) - 1)
        self.building = column.astype(np.int32)[None, :]
        self.left = lefts[column][None, :]
        super().__init__(scene, frame, tops[column][None, :])
        self.lights = dice.child("windows").floats(64, 64)
        colours = np.array(_NEON if scene.mood == "cyber" else _WARM, np.float32)
        self.window_colours = colours[np.array([dice.below(len(colours)) for _ in range(64)])]
        self.share = 0.46 if scene.dark else {"dusk": 0.42, "sunset": 0.30, "storm": 0.34}.get(scene.mood, 0.10)
        body = mix(scene.colour(NEAR), scene.haze, 0.62 * (1.0 - t) + 0.06)
        self.body = body
        tones = dice.child("tones").floats(256) * np.float32(0.34) + np.float32(0.80)
        self.tone = tones[self.building & 255]

    def colours(self, ys: Array) -> Array:
        scene, frame, t = self.scene, self.frame, self.nearness
        rise = np.clip((np.float32(self.foot) - ys) * np.float32(2.4), 0.0, 1.0)
        face = frame.xs - self.left
        side = 1.0 if scene.sun[0] < scene.right * 0.5 else -1.0
        shaded = np.where((face < np.float32(0.016)) == (side > 0), np.float32(1.18), np.float32(0.92))
        tone = self.tone * shaded
        colour: Array = self.body[:, None, None] * (tone * np.ones_like(ys))
        glow = scene.haze if scene.mood != "day" else mix(scene.haze, scene.colour(NEAR), 0.3)
        over(colour, glow, (np.float32(1.0) - rise) * np.float32(0.50 - 0.30 * t))
        if scene.mood in ("sunset", "dawn", "dusk", "day"):
            over(colour, mix(scene.colour(LIGHT), scene.sky[3], 0.5), rise * rise * np.float32(0.16))
        self._windows(colour, ys, face)
        return colour

    def _windows(self, colour: Array, ys: Array, face: Array) -> None:
        across, up = face * np.float32(1.0 / self.bay), (np.float32(self.foot) - ys) * np.float32(1.0 / self.floor)
        column, row = np.floor(across), np.floor(up)
        fx, fy = across - column, up - row
        chosen = (self.building * 7 + column.astype(np.int32) * 3) & 63
        story = (row.astype(np.int32) * 5 + self.building * 11) & 63
        lamp = self.lights[story, chosen]
        crisp = min(1.0, max(0.0, self.floor * self.frame.pixels / 3.0 - 0.4))
        hole_x = ((fx > 0.22) & (fx < 0.80)).astype(np.float32)
        hole_y = ((fy > 0.26) & (fy < 0.78)).astype(np.float32)
        hole = hole_x * hole_y * np.float32(crisp) + np.float32(0.30 * (1.0 - crisp))
        lit = ramp(1.0 - self.share, 1.0 - self.share + 0.22, lamp) * np.float32(0.55 + 0.45 * self.nearness)
        clear = (ys - self.ridge) > np.float32(self.floor * 0.7)
        tint = np.moveaxis(self.window_colours[self.building & 63], -1, 0)
        if not self.scene.dark:
            over(colour, self.scene.sky[1], hole * clear * np.float32(0.35))
        over(colour, tint, hole * lit * clear)


def _buildings(dice: Dice, scene: Scene, t: float) -> tuple[Array, Array]:
    """Return left edges and roof heights of columns, stepped towers and spires as columns of their own."""
    lefts: list[float] = []
    tops: list[float] = []
    centre = dice.between(0.35, 0.65) * scene.right
    foot, x = scene.horizon, -0.05
    while x < scene.right + 0.02:
        wide = dice.between(0.030, 0.075) * (0.8 + 0.5 * t)
        middle = max(0.0, 1.0 - abs(x - centre) / (0.62 * scene.right))
        tall = 0.05 + dice.between(0.0, 0.13) + (dice.between(0.0, 1.0) ** 2) * 0.34 * middle * (1.1 - 0.45 * t)
        tall *= 1.16 - 0.30 * t
        if tall > 0.22 and dice.chance(0.7):
            step, crown = wide * dice.between(0.12, 0.24), tall * dice.between(0.84, 0.94)
            lefts += [x, x + step, x + wide - step]
            tops += [foot - crown, foot - tall, foot - crown]
            if dice.chance(0.6):
                mast = wide * 0.5 - 0.0016
                lefts[-1:-1] = [x + mast, x + mast + 0.0032]
                tops[-1:-1] = [foot - tall - dice.between(0.03, 0.08), foot - tall]
        else:
            lefts.append(x)
            tops.append(foot - tall)
        x += wide
        if dice.chance(0.35):
            lefts.append(x)
            tops.append(foot - dice.between(0.01, 0.04))
            x += dice.between(0.004, 0.014)
    return np.array(lefts, np.float32), np.array(tops, np.float32)


class Signs:
    """Neon signs hung on the near towers; their glow is the finishing pass's bloom."""

    def __init__(self, scene: Scene, frame: Frame) -> None:
        self.scene, self.frame = scene, frame

    def paint_all(self, canvas: Array) -> None:
        dice, frame, scene = self.scene.dice.child("signs"), self.frame, self.scene
        for _ in range(int(26 * scene.right)):
            x, tall = dice.between(0, scene.right), dice.between(0.02, 0.075)
            y, wide = scene.horizon - dice.between(0.015, 0.20), dice.between(0.004, 0.010)
            colour = np.array(dice.pick(_NEON), np.float32)
            rows = slice(frame.row(y - tall), frame.row(y))
            left, right = int(x * frame.pixels), int((x + wide) * frame.pixels)
            if rows.start < rows.stop and 0 <= left < right <= frame.width:
                over(canvas[:, rows, left:right], colour, np.float32(0.85) * np.ones((1, 1), np.float32))
