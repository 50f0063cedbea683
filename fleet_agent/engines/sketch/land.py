"""Solid ground: mountains with relief and snow, hills and dunes, conifer forests, meadows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from PIL import Image, ImageDraw

from fleet_agent.engines.sketch.blend import cover_of, over
from fleet_agent.engines.sketch.dice import Array, Dice
from fleet_agent.engines.sketch.noise import grid, line, nearest, ramp, sample
from fleet_agent.engines.sketch.palettes import FAR, GROUND, LIGHT, NEAR, mix
from fleet_agent.engines.sketch.scene import Frame, Scene

_SNOW = np.array([0.93, 0.95, 1.0], np.float32)
_SAND = np.array([0.86, 0.62, 0.38], np.float32)


def _edge(frame: Frame, ys: Array, ridge: Array) -> Array:
    """Anti-aliased cover of what lies below a profile."""
    cover: Array = np.clip((ys - ridge) * np.float32(frame.pixels) + np.float32(0.5), 0.0, 1.0)
    return cover


class Slope(ABC):
    """One layer of land below a profile; `hidden_below` is the row under which nearer layers cover it."""

    def __init__(self, scene: Scene, frame: Frame, ridge: Array) -> None:
        self.scene, self.frame, self.ridge = scene, frame, ridge
        self.top = frame.row(float(ridge.min())) - 1
        self.hidden_below = frame.height

    def lowest(self) -> int:
        return self.frame.row(float(self.ridge.max())) + 2

    def rows(self, rows: slice) -> slice | None:
        start, stop = max(rows.start, self.top), min(rows.stop, self.hidden_below)
        return slice(start, stop) if start < stop else None

    def paint(self, canvas: Array, rows: slice) -> None:
        part = self.rows(rows)
        if part is not None:
            ys = self.frame.ys[part]
            over(canvas[:, part], self.colours(ys), _edge(self.frame, ys, self.ridge))

    @abstractmethod
    def colours(self, ys: Array) -> Array:
        """Return the colours (3, rows, columns) of what lies below the profile on these rows."""


class Mountain(Slope):
    """A jagged ridge, lit from the sun's side, with rock relief, snow above a line and haze at its foot."""

    def __init__(self, scene: Scene, frame: Frame, index: int, count: int) -> None:
        dice = scene.dice.child("mountain", index)
        self.nearness = index / max(1, count - 1)
        base = scene.horizon + 0.02 + 0.05 * self.nearness
        height = (0.50 - 0.30 * self.nearness) * dice.between(0.88, 1.12)
        pad = frame.pixels // 2
        xs = (np.arange(-pad, frame.width + pad, dtype=np.float32) + np.float32(0.5)) / np.float32(frame.pixels)
        rough_dice, form_dice = dice.child("rough"), dice.child("form")
        offset, first = np.float32(dice.between(0, 8)), 2.1 + 0.7 * index
        form = line(form_dice, xs + offset, first, 3, 0.42, sharp=True)
        rough = line(rough_dice, xs + offset, first * 4.0, 6, 0.55, sharp=True)
        peak = np.float32(dice.between(0.12, 0.88) * scene.right)
        rise = np.clip(np.float32(1.0) - np.abs(xs - peak) * np.float32(1.9), 0.0, 1.0)
        profile = form * form * np.float32(1.15) + rise * np.float32(0.50 * (1.0 - 0.6 * self.nearness))
        profile = profile + (rough - np.float32(0.5)) * np.float32(0.24)
        ridges = np.float32(base) - (profile - np.float32(0.10)) * np.float32(height)
        super().__init__(scene, frame, np.ascontiguousarray(ridges[None, pad : pad + frame.width]))
        self.height, self.pad = height, pad
        step = max(1, frame.pixels // 96)
        slope = np.zeros_like(ridges)
        slope[step:-step] = (ridges[2 * step :] - ridges[: -2 * step]) * np.float32(frame.pixels / (2.0 * step))
        self.slope = slope
        self.side = 1.0 if scene.sun[0] < scene.right * 0.5 else -1.0
        self.offset = (dice.between(0, 1), dice.between(0, 1))
        self.snowline = dice.between(0.26, 0.40) if not scene.has("snow") else 0.9
        body = mix(scene.colour(FAR), scene.colour(NEAR), self.nearness)
        self.base_colour = mix(body, scene.haze, 0.40 * (1.0 - self.nearness))

    def colours(self, ys: Array) -> Array:
        scene, frame = self.scene, self.frame
        below = ys - self.ridge
        xs = frame.xs
        scale = np.float32(0.9 + 0.5 * self.nearness)
        relief = sample(scene.rock(), xs * scale + self.offset[0], below * (scale * 0.75) + self.offset[1])
        crag = nearest(scene.rock(), xs * (scale * 2.7), below * (scale * 2.0) + self.offset[0])
        lean = (below * np.float32(-0.75 * self.side) + (relief - 0.5) * np.float32(0.045)) * np.float32(frame.pixels)
        column = np.arange(frame.width, dtype=np.int32)[None, :] + (lean.astype(np.int32) + np.int32(self.pad))
        facing = self.slope.take(column, mode="clip") * np.float32(-self.side)
        light = ramp(-0.75, 1.15, facing + (relief - np.float32(0.45)) * np.float32(1.5))
        light = np.clip(light + (crag - np.float32(0.40)) * np.float32(0.34), 0.0, 1.0)
        base = self.base_colour
        lit = mix(mix(base, scene.colour(LIGHT), 0.16 if scene.dark else 0.36), scene.sky[3], 0.12)
        shade = mix(base * np.float32(0.62), scene.sky[1], 0.20)
        colour = shade[:, None, None] + (lit - shade)[:, None, None] * light
        self._snow(colour, below, relief, light)
        depth = np.clip(below * np.float32(1.0 / (self.height * 1.25)), 0.0, 1.0)
        mist = 0.75 if scene.has("mist") else 0.52
        over(colour, scene.haze, depth * depth * np.float32(mist * (1.0 - 0.45 * self.nearness)))
        return colour

    def _snow(self, colour: Array, below: Array, relief: Array, light: Array) -> None:
        scene = self.scene
        if scene.has("desert") or (self.nearness > 0.7 and not scene.has("snow")):
            return
        altitude = np.float32(scene.horizon) - (below + self.ridge)
        line_at = np.float32(self.height * self.snowline * (0.95 if scene.has("snow") else 1.0))
        if scene.has("snow"):
            line_at = np.float32(0.02)
        cover = ramp(-0.03, 0.05, altitude - line_at - self.height * 0.35 + (relief - 0.5) * np.float32(0.16))
        if not cover.any():
            return
        bright = mix(mix(_SNOW, scene.colour(LIGHT), 0.35), scene.sky[3], 0.30 if scene.dark else 0.15)
        dark: Array = mix(scene.sky[1], scene.sky[2], 0.5) * np.float32(0.9)
        if scene.dark:
            bright *= np.float32(0.55)
        snow: Array = dark[:, None, None] + (bright - dark)[:, None, None] * light
        over(colour, snow, cover * np.float32(0.90))


class Hill(Slope):
    """A rounded ridge: grassland, snowfield or dune, shaded by the slope of its crest."""

    def __init__(self, scene: Scene, frame: Frame, index: int, count: int, *, base: float) -> None:
        dice = scene.dice.child("hill", index)
        t = index / max(1, count - 1)
        self.nearness = t
        height = 0.07 + 0.10 * t
        pad = frame.pixels
        xs = (np.arange(-pad, frame.width + pad, dtype=np.float32) + np.float32(0.5)) / np.float32(frame.pixels)
        xs = xs + np.float32(dice.between(0, 8))
        desert = scene.has("desert")
        profile = line(dice, xs, 1.5 + 0.9 * (1 - t), 3, 0.34)
        if desert:
            crest = line(dice.child("crest"), xs, 2.6 - 0.8 * t, 2, 0.25)
            profile = profile * np.float32(0.3) + crest * crest * np.float32(1.5)
        ridges = np.float32(base) - (profile - np.float32(0.3)) * np.float32(height)
        super().__init__(scene, frame, np.ascontiguousarray(ridges[None, pad : pad + frame.width]))
        slope = np.zeros_like(ridges)
        slope[1:-1] = (ridges[2:] - ridges[:-2]) * np.float32(frame.pixels * 0.5)
        self.slope, self.pad = slope, pad
        self.side = 1.0 if scene.sun[0] < scene.right * 0.5 else -1.0
        self.desert = desert
        self.offset = (dice.between(0, 1), dice.between(0, 1))
        self.base_colour = self._body(t)

    def _body(self, t: float) -> Array:
        scene = self.scene
        near = scene.colour(GROUND)
        far = mix(mix(scene.colour(FAR), scene.colour(NEAR), 0.6), near, 0.35)
        if self.desert:
            sand = mix(_SAND, scene.colour(LIGHT), 0.15)
            near = mix(sand, scene.sky[2], 0.25) * np.float32(0.18 if scene.dark else 0.86)
            far = mix(near, scene.haze, 0.45)
        elif scene.has("snow"):
            near = mix(_SNOW, scene.sky[0], 0.28) * np.float32(0.30 if scene.dark else 0.88)
            far = mix(near, scene.haze, 0.5)
        return mix(mix(far, scene.haze, 0.20 * (1 - t)), near, t)

    def colours(self, ys: Array) -> Array:
        scene, frame = self.scene, self.frame
        below = ys - self.ridge
        shift = (below * np.float32(-0.9 * self.side * frame.pixels)).astype(np.int32)
        column = np.arange(frame.width, dtype=np.int32)[None, :] + (shift + np.int32(self.pad))
        facing = self.slope.take(column, mode="clip") * np.float32(-self.side)
        scale = 1.6 - 0.8 * self.nearness
        texture = sample(scene.soft(), frame.xs * np.float32(scale) + self.offset[0], below * np.float32(3.2 * scale))
        light = np.float32(0.46) + facing * np.float32(1.5 if self.desert else 1.25)
        light += (texture - np.float32(0.5)) * np.float32(0.22 if self.desert else 0.45)
        fine = nearest(scene.soft(), frame.xs * np.float32(4.1 * scale), below * np.float32(17.0 * scale))
        light += (fine - np.float32(0.5)) * np.float32(0.10 if self.desert else 0.30)
        light -= np.clip(below * np.float32(2.2), 0.0, 0.25)
        light = np.clip(light, 0.0, 1.0)
        base = self.base_colour
        lit = mix(base, scene.colour(LIGHT), 0.12 if scene.dark else 0.42)
        shade = mix(base * np.float32(0.55), scene.sky[1], 0.20 * (1.0 - self.nearness) + 0.08)
        colour: Array = shade[:, None, None] + (lit - shade)[:, None, None] * light
        foot = np.clip(below * np.float32(5.0), 0.0, 1.0) * np.float32((1.0 - self.nearness) * 0.30)
        over(colour, scene.haze, foot)
        return colour


class Forest:
    """A stand of conifers as a silhouette, its foot in mist. Drawn once per frame with supersampling."""

    def __init__(self, scene: Scene, frame: Frame, index: int, *, base: Array, height: float, nearness: float) -> None:
        self.scene, self.frame, self.nearness = scene, frame, nearness
        dice = scene.dice.child("forest", index)
        self.base, self.height = base, height
        scale = 2 if frame.pixels >= 64 else 3
        self.top = max(0, frame.row(float(base.min()) - height * 1.35))
        self.end = frame.row(float(base.max()) + height * 0.5)
        mask = Image.new("L", (frame.width * scale, max(1, self.end - self.top) * scale), 0)
        draw = ImageDraw.Draw(mask)
        unit = frame.pixels * scale
        if nearness > 0.7 or scene.waterline is None:
            self.end = frame.height
            mask = Image.new("L", (frame.width * scale, max(1, self.end - self.top) * scale), 0)
            draw = ImageDraw.Draw(mask)
        step = max(1, frame.width // 64)
        edge = [(c * scale, (float(base[0, c]) * frame.pixels - self.top) * scale) for c in range(0, frame.width, step)]
        edge.append((frame.width * scale, edge[-1][1]))
        draw.polygon([(0, mask.height), *edge, (frame.width * scale, mask.height)], fill=255)
        x = -0.02
        while x < frame.right + 0.02:
            column = max(0, min(frame.width - 1, int(x * frame.pixels)))
            tall = height * dice.between(0.45, 1.15) * (1.2 if dice.chance(0.15) else 1.0)
            foot = (float(base[0, column]) + height * 0.10) * unit - self.top * scale
            _conifer(draw, dice, x * unit, foot, tall * unit, detail=nearness)
            x += height * dice.between(0.10, 0.26)
        self.cover = cover_of(mask, scale)
        self.top_y = float(base.min()) - height
        body = mix(scene.colour(NEAR), scene.colour(GROUND), nearness)
        if scene.has("snow"):
            body = scene.colour(NEAR) * np.float32(1.0 - 0.62 * nearness)
        self.colour = mix(body * np.float32(0.72), scene.haze, 0.42 * (1.0 - nearness))

    def paint(self, canvas: Array, rows: slice) -> None:
        start, stop = max(rows.start, self.top), min(rows.stop, self.end)
        frame, scene = self.frame, self.scene
        if start < stop:
            part = slice(start, stop)
            ys = frame.ys[part]
            depth = np.clip((ys - self.base) * np.float32(1.0 / self.height) + np.float32(0.9), 0.0, 1.3)
            mist = depth * depth * np.float32((0.55 if scene.has("mist") else 0.26) * (1.15 - self.nearness))
            floor = grid(scene.soft(), frame.xs * np.float32(1.3), ys * np.float32(4.0)) - np.float32(0.5)
            colour: Array = self.colour[:, None, None] * (np.float32(1.0) + floor * np.float32(0.5))
            over(colour, scene.haze, np.clip(mist + floor * depth * np.float32(0.16), 0.0, 1.0))
            over(canvas[:, part], colour, self.cover[start - self.top : stop - self.top])


def _conifer(draw: ImageDraw.ImageDraw, dice: Dice, x: float, foot: float, tall: float, *, detail: float) -> None:
    tiers = 5 + int(detail * 4)
    half = tall * dice.between(0.13, 0.19)
    points: list[tuple[float, float]] = [(x, foot - tall)]
    left: list[tuple[float, float]] = []
    for tier in range(1, tiers + 1):
        t = tier / tiers
        y = foot - tall * (1.0 - 0.92 * t)
        wide = half * t * dice.between(0.82, 1.15)
        droop = tall * 0.02
        points += [(x + wide, y + droop), (x + wide * 0.55, y - droop)]
        left += [(x - wide * dice.between(0.85, 1.1), y + droop), (x - wide * 0.55, y - droop)]
    points += [(x + half * 0.12, foot), (x - half * 0.12, foot)]
    draw.polygon(points + left[::-1], fill=255)


class Copse:
    """Clumps of small conifers standing on a hill."""

    def __init__(self, scene: Scene, frame: Frame, index: int, hill: Hill) -> None:
        dice = scene.dice.child("copse", index)
        size = 0.020 + 0.050 * hill.nearness
        self.top = max(0, frame.row(float(hill.ridge.min()) - size))
        self.end = min(frame.height, frame.row(float(hill.ridge.max()) + 0.14))
        mask = Image.new("L", (frame.width * 2, max(1, self.end - self.top) * 2), 0)
        draw, unit = ImageDraw.Draw(mask), frame.pixels * 2
        for _ in range(3 + dice.below(4)):
            middle, low = dice.between(0, scene.right), dice.between(-0.004, 0.03 + 0.04 * hill.nearness)
            for _ in range(4 + dice.below(14)):
                x = middle + dice.between(-1.0, 1.0) * dice.between(0.02, 0.13)
                column = max(0, min(frame.width - 1, int(x * frame.pixels)))
                foot = (float(hill.ridge[0, column]) + max(0.0, low) + dice.between(0, 0.010)) * unit - self.top * 2
                _conifer(draw, dice, x * unit, foot, size * dice.between(0.5, 1.1) * unit, detail=0.0)
        self.cover = cover_of(mask, 2)
        body = mix(hill.base_colour * np.float32(0.42), scene.colour(NEAR) * np.float32(0.7), 0.45)
        self.body = mix(body, scene.haze, 0.26 * (1.0 - hill.nearness))

    def paint(self, canvas: Array, rows: slice) -> None:
        start, stop = max(rows.start, self.top), min(rows.stop, self.end)
        if start < stop:
            over(canvas[:, start:stop], self.body, self.cover[start - self.top : stop - self.top])


class Meadow(Slope):
    """Flat ground in perspective from the horizon to the lower edge."""

    def __init__(self, scene: Scene, frame: Frame, top: float) -> None:
        dice = scene.dice.child("meadow")
        ridge = np.float32(top) - line(dice, frame.xs, 2.0, 3, 0.4) * np.float32(0.03)
        super().__init__(scene, frame, ridge)
        self.start = top
        self.offset = (dice.between(0, 1), dice.between(0, 1))

    def colours(self, ys: Array) -> Array:
        scene, frame = self.scene, self.frame
        depth = np.clip((ys - np.float32(self.start)) * np.float32(1.0 / max(0.05, scene.bottom - self.start)), 0, 1)
        near, far = scene.colour(GROUND), mix(scene.colour(FAR), scene.colour(NEAR), 0.6)
        if scene.has("snow"):
            near = mix(_SNOW, scene.sky[1], 0.28) * np.float32(0.30 if scene.dark else 0.94)
            far = mix(near, scene.haze, 0.4)
        far = mix(far, scene.haze, 0.25)
        away = np.float32(0.16) / (depth + np.float32(0.10))
        u = (frame.xs - np.float32(scene.right * 0.5)) * away * np.float32(0.9) + self.offset[0]
        v = away * np.float32(1.6) + self.offset[1] + np.zeros_like(u)
        tufts = sample(scene.soft(), u, v)
        blades = grid(scene.rock(), frame.xs * 5.0, ys * 1.4)
        light = np.clip(np.float32(0.25) + tufts * np.float32(0.6) + (blades - 0.4) * depth * np.float32(0.35), 0, 1)
        tone = far[:, None, None] + (near - far)[:, None, None] * depth
        lit = tone + (scene.colour(LIGHT)[:, None, None] - tone) * np.float32(0.12 if scene.dark else 0.30)
        colour: Array = tone * np.float32(0.62) + (lit - tone * np.float32(0.62)) * light
        return colour


class Knoll(Slope):
    """Dark ground in front, for someone to stand on against the light."""

    def __init__(self, scene: Scene, frame: Frame, place: float) -> None:
        away = (frame.xs - np.float32(place)) * np.float32(2.2)
        rough = line(scene.dice.child("knoll"), frame.xs, 22.0, 3, 0.6) * np.float32(0.014)
        rise = np.float32(0.10) / (np.float32(1.0) + away * away) - np.float32(0.006)
        super().__init__(scene, frame, np.float32(scene.bottom) - rise - rough)

    def colours(self, ys: Array) -> Array:
        fade = np.clip((ys - np.float32(self.scene.bottom - 0.1)) * np.float32(6.0), 0.0, 1.0)
        dark = self.scene.colour(GROUND) * np.float32(0.45)
        shade: Array = dark[:, None, None] * (np.float32(1.0) - fade * np.float32(0.45)) + 0 * self.ridge
        return shade


def hide_covered(layers: Sequence[Slope]) -> None:
    """Tell each layer where the next one covers it wholly, so that hidden rows are not painted."""
    for behind, before in pairwise(layers):
        behind.hidden_below = min(behind.hidden_below, before.lowest())
