"""The colours of each mood: what a checkpoint holds, and what a LoRA shifts.

A palette is 12 colours: five stops of the sky from zenith to horizon, then the light (sun, moon or neon), clouds
lit and shaded, land far and near, water, and the ground in front.
"""

from __future__ import annotations

import numpy as np

from fleet_agent.engines.sketch.dice import Array
from fleet_agent.engines.sketch.words import MOODS, Mood

SKY = slice(0, 5)
LIGHT, CLOUD_LIT, CLOUD_SHADE, FAR, NEAR, WATER, GROUND = range(5, 12)
COLOURS_PER_MOOD = 12

_HEX: dict[Mood, str] = {
    "day": "1d5fb4 3c8ad2 6fb3e8 a9d6f4 e6f1ee fff6d8 ffffff a9bfd8 8fb0cc 35604a 2c7fa6 3d6b34",
    "sunset": "33295c 7d3b68 cf5a4e f58b45 ffcf7d ffe9b0 ffb27a 7c4166 b06070 43202f 8c4650 2c1620",
    "dawn": "41598f 7f86b8 c4a0bd f2bda8 ffe6bd fff3d2 ffdcc4 9a86ac b09ab8 4a4560 8d93b4 3b4444",
    "night": "03050f 070d22 0e1a3c 182a56 2c4674 e8efff 3c4f7c 121c38 1d2c50 080d1c 14284c 060a14",
    "cyber": "070316 140833 33105c 7c1a80 f0428c ff5fae 8a2a8e 1e0c44 42206c 0d0720 26104c 0a0516",
    "storm": "1c242c 33404a 53616a 7b888c b0b5ac e8ecdf b9c0bf 3d474f 6c7a80 263034 4a5a60 1f2a28",
    "winter": "4f82bd 7fabd8 a9c8e4 cbdcea f0e6dc fff4e2 f4f8ff 93abc8 b6c8da 5f7c98 7ea3bf e4edf4",
    "dusk": "151a44 3b2d70 7b4a92 c96f96 f7ad86 ffdcb0 d98aa6 4a3b7a 7d5f96 231c40 574a86 1a1630",
}


def _parse(text: str) -> list[list[float]]:
    return [[int(h[i : i + 2], 16) / 255.0 for i in (0, 2, 4)] for h in text.split()]


def built_in() -> Array:
    """Return the palettes of the built-in model, shape (moods, 12, 3), values 0..1."""
    return np.array([_parse(_HEX[mood]) for mood in MOODS], np.float32)


def mix(a: Array, b: Array, t: float) -> Array:
    """Return the colour `t` of the way from `a` to `b`."""
    return a + (b - a) * np.float32(t)


def luminance(colour: Array) -> float:
    """Return the perceived lightness of one colour, 0..1."""
    return float(colour[0]) * 0.299 + float(colour[1]) * 0.587 + float(colour[2]) * 0.114


def gradient(stops: Array, t: Array) -> Array:
    """Return (3, *t.shape): the colour at `t` (0..1) along equally spaced stops, eased a little between them."""
    position = np.clip(t, 0.0, 1.0) * np.float32(len(stops) - 1)
    index = np.minimum(np.floor(position), np.float32(len(stops) - 2)).astype(np.int32)
    fraction = position - index.astype(np.float32)
    low, high = stops[index], stops[index + 1]
    out = low + (high - low) * fraction[..., None]
    return np.ascontiguousarray(np.moveaxis(out, -1, 0), dtype=np.float32)
