"""Water: the picture above mirrored, broken by ripples that grow towards the viewer, with the light's path."""

from __future__ import annotations

import numpy as np

from fleet_agent.engines.sketch.blend import add, over
from fleet_agent.engines.sketch.dice import Array
from fleet_agent.engines.sketch.noise import ramp, sample
from fleet_agent.engines.sketch.palettes import LIGHT, WATER
from fleet_agent.engines.sketch.scene import Frame, Scene


class Water:
    """Paints rows below the waterline from the finished rows above it."""

    def __init__(self, scene: Scene, frame: Frame) -> None:
        assert scene.waterline is not None
        self.scene, self.frame, self.line = scene, frame, scene.waterline
        self.top = frame.row(self.line)
        dice = scene.dice.child("water")
        self.origin = (dice.between(0, 1), dice.between(0, 1))
        self.rough = 1.0 if scene.has("sea") else 0.38
        self.reach = max(0.05, scene.bottom - self.line)

    def paint(self, canvas: Array, rows: slice) -> None:
        start = max(rows.start, self.top)
        if start >= rows.stop:
            return
        scene, frame = self.scene, self.frame
        part = slice(start, rows.stop)
        ys = frame.ys[part]
        depth = np.maximum(ys - np.float32(self.line), np.float32(0.0))
        near = depth * np.float32(1.0 / self.reach)
        away = np.float32(0.13) / (near + np.float32(0.07))
        middle = np.float32(scene.right * 0.5)
        u = (frame.xs - middle) * away * np.float32(0.80) + np.float32(self.origin[0])
        v = away * np.float32(5.2) + np.float32(self.origin[1]) + np.zeros_like(u)
        swell = sample(scene.soft(), u, v) - np.float32(0.5)
        chop = sample(scene.soft(), u * np.float32(3.1), v * np.float32(2.3)) - np.float32(0.5)
        wave = swell * np.float32(0.60) + chop * np.float32(0.60)
        push = wave * (near + np.float32(0.10)) * np.float32(self.rough * 0.30)
        source = np.float32(self.line) - depth * np.float32(0.94) - push - np.float32(1.0 / frame.pixels)
        sy = np.clip((source * np.float32(frame.pixels)).astype(np.int32), 0, max(0, self.top - 1))
        sx = (frame.xs + swell * np.float32(self.rough * 0.035) * (near + 0.1)) * np.float32(frame.pixels)
        index = sy * np.int32(frame.width) + np.clip(sx.astype(np.int32), 0, frame.width - 1)
        tint = scene.colour(WATER)
        tinted = near * np.float32(0.24 + 0.26 * self.rough) + np.float32(0.16 + 0.16 * self.rough)
        mixing = np.clip(tinted - wave * np.float32(0.9 * self.rough), 0.05, 0.92)
        band = canvas[:, part]
        for channel in range(3):
            seen = canvas[channel, : self.top].ravel().take(index)
            band[channel] = seen + (tint[channel] * np.float32(0.8) - seen) * mixing
        if scene.has("sun", "moon"):
            self._path(band, near, wave)
        shore = np.clip(np.float32(1.0) - near * np.float32(26.0), 0.0, 1.0)
        over(band, scene.haze, shore * np.float32(0.40))

    def _path(self, band: Array, near: Array, wave: Array) -> None:
        scene = self.scene
        dx = (self.frame.xs - np.float32(scene.sun[0])) / (np.float32(0.030) + near * np.float32(0.11))
        spread = np.float32(1.0) / (np.float32(1.0) + dx * dx)
        glints = ramp(-0.02, 0.16, wave + spread * np.float32(0.10) - np.float32(0.03))
        strength = np.float32(0.85 if scene.mood in ("sunset", "dawn", "cyber") else 0.62)
        add(band, scene.colour(LIGHT), spread * spread * glints * strength * (np.float32(1.1) - near * 0.5))
        far = np.float32(0.12) / (np.float32(1.0) + dx * dx * np.float32(0.05))
        add(band, scene.colour(LIGHT), far * ramp(0.05, 0.30, wave))
