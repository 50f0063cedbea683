"""The sky: gradient, sun or moon with its glow, stars, the galaxy, aurora and clouds in perspective."""

from __future__ import annotations

import numpy as np

from fleet_agent.engines.sketch.blend import add, over, shine, stamp
from fleet_agent.engines.sketch.dice import Array
from fleet_agent.engines.sketch.noise import grid, line, ramp, resize, sample
from fleet_agent.engines.sketch.palettes import CLOUD_LIT, CLOUD_SHADE, LIGHT, gradient, mix
from fleet_agent.engines.sketch.scene import Frame, Scene

_WHITE = np.ones(3, np.float32)


class Sky:
    """Paints every row: below the horizon the last stop goes on, for what does not cover it."""

    def __init__(self, scene: Scene, frame: Frame) -> None:
        self.scene, self.frame = scene, frame
        self.dice = scene.dice.child("sky")
        self.drift = (self.dice.between(0, 1), self.dice.between(0, 1))

    def paint(self, canvas: Array, rows: slice) -> None:
        scene, frame = self.scene, self.frame
        ys, xs = frame.ys[rows], frame.xs
        band = canvas[:, rows]
        band[:] = gradient(scene.sky, ys * np.float32(1.0 / scene.horizon))
        wash = grid(scene.soft(), xs * 0.35 + self.drift[0], ys * 0.9 + self.drift[1])
        wash -= np.float32(0.5)
        wash *= np.float32(0.10)
        wash += np.float32(1.0)
        band *= wash
        clear = scene.mood == "night" and scene.has("stars") and not scene.has("moon", "clouds")
        if scene.has("galaxy") or clear:
            self._galaxy(band, xs, ys)
        if scene.has("aurora"):
            self._aurora(band, xs, ys)
        if scene.has("sun", "moon"):
            self._light(band, xs, ys)

    def _light(self, band: Array, xs: Array, ys: Array) -> None:
        scene = self.scene
        moon = scene.has("moon") and scene.mood not in ("day", "sunset", "dawn", "cyber")
        x, y, radius = *scene.sun, scene.sun_radius
        dx, dy = xs - np.float32(x), ys - np.float32(y)
        square = dx * dx + dy * dy
        glow = scene.colour(LIGHT)
        wide = np.float32(0.10 if moon else 0.12 if scene.mood in ("day", "winter", "storm") else 0.16) ** 2
        amount = wide / (square + wide)
        wash = 0.30 if moon else 0.38 if scene.mood in ("sunset", "cyber") else 0.24
        amount *= amount * np.float32(0.35) + np.float32(wash)
        low = scene.mood in ("sunset", "dawn", "dusk")
        if low:
            flat = np.float32(0.020) / (dy * dy * np.float32(3.0) + np.float32(0.020))
            amount += flat * (
                np.float32(0.10 if scene.mood == "dawn" else 0.16) / (np.float32(1.0) + dx * dx * np.float32(3.5))
            )
        shine(band, mix(glow, scene.colour(4), 0.35 if low else 0.1), amount * np.float32(1.35))
        distance = np.sqrt(square)
        edge = np.float32(scene.sun_radius) - distance
        disc = np.clip(edge * np.float32(self.frame.pixels) + np.float32(0.5), 0.0, 1.0)
        if not disc.any():
            return
        if scene.mood == "cyber":
            self._striped(band, disc, dy, radius)
        elif moon:
            zoom = np.float32(0.16 / radius)
            seas = ramp(0.42, 0.66, sample(scene.soft(), dx * zoom + self.drift[0], dy * zoom + self.drift[1]))
            rim = square * np.float32(1.0 / radius**2)
            face = np.float32(1.02) - seas * np.float32(0.24) - rim * rim * np.float32(0.16)
            over(band, glow[:, None, None] * face, disc)
        else:
            over(band, mix(glow, _WHITE, 0.65) * np.float32(1.35), disc)

    def _striped(self, band: Array, disc: Array, dy: Array, radius: float) -> None:
        t = (dy * np.float32(1.0 / radius) + np.float32(1.0)) * np.float32(0.5)
        slots = t * np.float32(9.0)
        gap = ramp(0.0, 0.12, slots - np.floor(slots) - t * np.float32(0.62))
        gap = np.where(t < 0.42, np.float32(1.0), gap)
        colours = gradient(np.array([[1.0, 0.86, 0.42], [1.0, 0.42, 0.46], [0.95, 0.16, 0.62]], np.float32), t)
        over(band, colours, disc * gap * np.float32(0.92))

    def _galaxy(self, band: Array, xs: Array, ys: Array) -> None:
        tilt = np.float32(0.55)
        centre = np.float32(self.scene.horizon * 0.45) - (xs - np.float32(self.scene.right * 0.5)) * tilt
        away = (ys - centre) * np.float32(4.2)
        veil = np.float32(1.0) / (np.float32(1.0) + away * away)
        veil *= veil
        dust = grid(self.scene.soft(), xs * 0.9 + self.drift[1], ys * 0.9 + self.drift[0])
        fine = grid(self.scene.rock(), xs * 0.7, ys * 0.7)
        light = veil * ramp(0.30, 0.85, dust) * np.float32(0.42)
        add(band, np.array([0.72, 0.70, 1.0], np.float32), light)
        add(band, np.array([1.0, 0.55, 0.72], np.float32), light * fine * np.float32(0.55))

    def _aurora(self, band: Array, xs: Array, ys: Array) -> None:
        for index in range(3):
            dice = self.dice.child("aurora", index)
            foot = np.float32(self.scene.horizon * (0.58 - 0.17 * index)) + (
                line(dice.child("foot"), xs, 1.4, 3) - np.float32(0.5)
            ) * np.float32(0.42)
            rays = line(dice.child("rays"), xs, 18.0, 3, 0.7)
            reach = np.float32(0.22) + line(dice.child("reach"), xs, 3.0, 2) * np.float32(0.28)
            rise = (foot - ys) / reach
            inside = np.clip(rise * np.float32(9.0) + np.float32(0.5), 0.0, 1.0) * np.clip(1.0 - rise, 0.0, 1.0)
            light = inside * inside * (np.float32(0.25) + rays * rays * np.float32(1.1))
            add(band, np.array([0.10, 0.85, 0.50], np.float32), light * np.float32(0.95))
            add(band, np.array([0.55, 0.20, 0.85], np.float32), light * np.clip(rise, 0.0, 1.0) * np.float32(0.6))


class Stars:
    """Scattered points, thinning towards the horizon; painted once on the whole canvas."""

    def __init__(self, scene: Scene, frame: Frame) -> None:
        self.scene, self.frame = scene, frame

    def paint_all(self, canvas: Array) -> None:
        scene, frame = self.scene, self.frame
        dice = scene.dice.child("stars")
        count = int(900 * scene.right * scene.bottom * (1.6 if scene.has("galaxy") else 1.0))
        draws = dice.floats(5, count)
        xs = draws[0] * np.float32(frame.width)
        ys = draws[1] * draws[1] * np.float32(0.15) + draws[1] * np.float32(0.85)
        fade = np.float32(1.0) - ys
        ys = ys * np.float32(scene.horizon * frame.pixels)
        strength = draws[2] * draws[2] * draws[2] * fade * np.float32(0.55 if scene.mood == "dusk" else 1.0)
        tint = np.stack([0.8 + 0.2 * draws[3], 0.85 + 0.1 * draws[4], 1.0 - 0.15 * draws[3]]).astype(np.float32)
        scale = frame.pixels / 1024.0
        for low, radius in ((0.0, 0.55), (0.45, 1.1), (0.82, 1.9)):
            keep = draws[2] >= low
            size = max(0.35, radius * scale)
            dim = np.clip(strength[keep] * np.float32(1.3 * min(1.0, scale * 1.6)), 0.0, 1.0)
            stamp(canvas, xs[keep], ys[keep], size, tint[:, keep], dim)


class Clouds:
    """A plane of cloud seen from below, smaller towards the horizon, lit from where the sun stands."""

    def __init__(self, scene: Scene, frame: Frame) -> None:
        self.scene, self.frame = scene, frame
        dice = scene.dice.child("clouds")
        self.origin = (dice.between(0, 1), dice.between(0, 1))
        heavy = scene.mood == "storm"
        self.threshold = dice.between(0.28, 0.34) if heavy else dice.between(0.34, 0.43)
        self.end = frame.row(scene.horizon) + 1
        self.field = resize(np.stack(self._half_field()), self.end, frame.width)

    def _half_field(self) -> tuple[Array, Array]:
        frame, scene = self.frame, self.scene
        rows, columns = (max(2, min(512, (side + 1) // 2)) for side in (self.end, frame.width))
        half = np.float32(scene.horizon / rows)
        ys = ((np.arange(rows, dtype=np.float32) + np.float32(0.5)) * half)[:, None]
        xs = ((np.arange(columns, dtype=np.float32) + 0.5) * np.float32(scene.right / columns))[None, :]
        far = np.float32(0.46) / (np.float32(scene.horizon + 0.16) - ys)
        u = (xs - np.float32(scene.right * 0.5)) * far * np.float32(0.34) + np.float32(self.origin[0])
        v = far * np.float32(0.62) + np.float32(self.origin[1])
        soft = scene.soft()
        warp = sample(soft, u * np.float32(0.7), v * np.float32(0.7) + np.zeros_like(u)) - np.float32(0.5)
        u = u + warp * np.float32(0.16)
        v = v + warp * np.float32(0.10)
        body = sample(soft, u, v)
        fine = sample(soft, u * np.float32(3.7), v * np.float32(3.7))
        towards = np.float32(0.022 if scene.sun[0] > scene.right * 0.5 else -0.022)
        toward_light = sample(soft, u + towards, v - np.float32(0.012))
        shape = body * np.float32(0.80) + fine * np.float32(0.20)
        density = ramp(self.threshold, self.threshold + 0.26, shape)
        lit = np.clip(np.float32(0.52) + (body - toward_light) * np.float32(4.2) - density * np.float32(0.22), 0, 1)
        horizon_fade = ramp(0.0, 0.16, np.float32(scene.horizon) - ys)
        density *= np.float32(0.25) + horizon_fade * np.float32(0.75)
        return density, lit

    def paint(self, canvas: Array, rows: slice) -> None:
        stop = min(rows.stop, self.end)
        if rows.start >= stop:
            return
        rows = slice(rows.start, stop)
        density, lit = self.field[0, rows], self.field[1, rows]
        scene = self.scene
        ys = self.frame.ys[rows]
        depth = ys * np.float32(1.0 / scene.horizon)
        bright = scene.colour(CLOUD_LIT)
        shade = gradient(np.stack([scene.colour(CLOUD_SHADE), mix(scene.colour(CLOUD_SHADE), scene.haze, 0.6)]), depth)
        dx = self.frame.xs - np.float32(scene.sun[0])
        dy = ys - np.float32(scene.sun[1])
        square = dx * dx + dy * dy
        near = np.float32(0.10) / (square + np.float32(0.10))
        if scene.has("moon"):  # thin before the moon, so that its face stays whole
            density = density * ramp(scene.sun_radius * 0.9, scene.sun_radius * 2.6, np.sqrt(square))
        lit = np.clip(lit * (np.float32(0.75) + near * np.float32(0.55)), 0.0, 1.2)
        colour = shade + (bright[:, None, None] - shade) * lit
        over(canvas[:, rows], colour, density * np.float32(0.50 if scene.dark else 0.92))
